"""`quality`, `ablation`, `subspace`, `timesteps` and more: train and score methods on subjects of the tiny world.

A cell is (variant, subject, seed). Every cell trains through `Trainer.fit`, generates the evaluation prompts and is
scored by the embedded metric encoders; its row is kept at once, so that a stopped run carries on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from inspect import signature
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, measured_with, row
from benchmarks.trained.differences import difference
from benchmarks.trained.variants import PROJECTIONS, SUITES, Settings, resolve
from mep_lightning.comparison.engines.local import end_with_parent

SCORES = ("clip_t", "clip_i", "dino", "dino_inter", "heldout_loss")


@contextmanager
def photos_of(who: Any) -> Iterator[str]:
    """A subject's photos in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for i, photo in enumerate(who.photos()):
            photo.save(Path(folder) / f"{i}.png")
        yield folder


def train(
    settings: Settings, data: Any, seed: int, folder: str, watching: Iterable[Any] = (), device: str = "cpu"
) -> Any:
    """One run of one method through a Trainer, with resolved settings.

    Args:
        settings: as `resolve` answers.
        data: a `SubjectData`.
        seed: of everything that is drawn.
        folder: for what the run keeps meanwhile.
        watching: more callbacks.
        device: "cpu" or "cuda".

    Returns:
        The trained module.
    """
    from lightning import Trainer

    from benchmarks.trained import literature
    from mep_lightning import PersonalizationModule, adapters, estimators, selection, timesteps
    from mep_lightning.callbacks import PUTS, HollowedActivations

    def part(kind: Any) -> Any:
        return kind(**{key: settings[key] for key in signature(kind).parameters if key in settings})

    def way(name: str) -> Any:
        return part(getattr(estimators, name, None) or getattr(literature, name))

    selector = settings.get("selector")
    made_by = literature.OwnNoise if settings.get("own_noise") else PersonalizationModule
    module = made_by(
        precision=settings["precision"],
        adapter=part(getattr(adapters, settings.get("adapter", "TokenEmbedding"))),
        estimator=way(settings["estimator"]),
        subspace=next((way(PROJECTIONS[key]) for key in PROJECTIONS if settings.get(key)), None),
        timesteps=getattr(timesteps, settings["timesteps"])() if "timesteps" in settings else None,
        selector=getattr(selection, selector[0])(**selector[1]) if selector else None,
        low_resolution=settings.get("low_resolution"),
        checkpointing=settings.get("checkpointing", False),
        activations=settings.get("activations", "auto"),
        lr=settings["lr"],
        lr_scheduler=settings["lr_scheduler"],
        betas=settings.get("betas", (0.9, 0.999)),
        eps=settings["eps"],
        seed=seed,
        method=settings["method"],
    )
    if settings["max_steps"] == 0:
        module.class_word = data.class_word
        module.load(device)
        return module
    callbacks: list[Any] = [PUTS(settings["puts_low"], settings["puts_high"])] if settings["puts"] else []
    if settings.get("searched"):
        callbacks.append(literature.PromptSearch())
    if "fraction" in settings:
        callbacks.append(HollowedActivations(settings["fraction"], settings["samples"], folder=folder))
    trainer = Trainer(
        max_steps=settings["max_steps"],
        callbacks=[*callbacks, *watching],
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def heldout_loss(module: Any, subject: Any, draws: int = 64) -> float:
    """The denoising loss over all timesteps on unseen photos of the subject (the same draws for every variant)."""
    import torch

    from mep_lightning.bases import encode_prompts
    from mep_lightning.data import sample_latents
    from mep_lightning.tiny.subjects import other_photos

    base = module.base
    generator = torch.Generator().manual_seed(77)
    with torch.no_grad(), base.borrowed_vae("encoder") as vae:
        posterior = vae.encode((other_photos(subject, draws) * 2 - 1).to(base.device, base.dtype)).latent_dist
        latents = sample_latents(posterior.mean, posterior.std, torch.zeros_like(posterior.mean), base.scaling_factor)
        noise = torch.randn(latents.shape, generator=generator).to(base.device)
        timestep = torch.linspace(20, 980, draws).long().to(base.device)
        noisy = base.scheduler.add_noise(latents.float(), noise, timestep)
        prompt = f"a photo of a {module.adapter.phrase(subject.class_word)}"
        with module.drawing():
            embeds = encode_prompts(base, [prompt], module.adapter.tokens()).expand(draws, -1, -1)
            return (base.unet(noisy.to(base.dtype), timestep, embeds).sample.float() - noise).pow(2).mean().item()


def cell(
    variant: str, settings: Settings, split: str, index: int, seed: int, images: int, device: str = "cpu"
) -> dict[str, Any]:
    """Train and score one cell, with resolved settings."""
    quiet()
    import torch

    from mep_lightning import SubjectData
    from mep_lightning.evaluation import evaluate, generate
    from mep_lightning.tiny import CLIP, DINO, evaluation_prompts
    from mep_lightning.tiny.subjects import subject

    torch.set_num_threads(1)
    who = subject(index, split)
    with photos_of(who) as folder:
        data = SubjectData(folder, class_word=who.class_word, seed=seed)
        began = time.monotonic()
        module = train(settings, data, seed, f"{folder}/kept", device=device)
        seconds = time.monotonic() - began
    token = module.adapter.token
    prompts = [p.format(token, who.class_word) for p in evaluation_prompts() for _ in range(images)]
    seeds = [i % images + 1000 * seed for i in range(len(prompts))]
    steps, guidance = settings["sampling_steps"], settings["guidance"]
    pictures = generate(module, prompts, seeds, steps=steps, guidance=guidance, batch_size=16)
    scores = evaluate(pictures, prompts, who.photos(), clip=CLIP, dino=DINO, token=token)
    scores["heldout_loss"] = heldout_loss(module, who)
    return {"variant": variant, "subject": who.name, "split": split, "seed": seed, "seconds": seconds, **scores}


def quiet() -> None:
    """A worker says nothing but what its suite prints."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def run_cells(
    variants: dict[str, Settings],
    path: Path,
    *,
    split: str = "test",
    subjects: int = 8,
    seeds: int = 3,
    images: int = 2,
    workers: int = 2,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """All cells that `path` (JSON lines) lacks, in worker processes of one thread each; returns every cell."""
    variants = {name: resolve(settings) for name, settings in variants.items()}
    keys = {name: fingerprint(settings, split, images) for name, settings in variants.items()}
    done = _kept(path, keys)
    have = {(c["variant"], c["index"], c["seed"]) for c in done}
    todo = [
        (name, index, seed)
        for seed in range(seeds)
        for index in range(subjects)
        for name in variants
        if (name, index, seed) not in have
    ]
    about = measured_with(device, threads=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = iter(todo)
    spawning = get_context("spawn")
    with ProcessPoolExecutor(workers, spawning, initializer=end_with_parent) as pool, path.open("a") as log:
        jobs: dict[Future[dict[str, Any]], tuple[str, int, int]] = {}

        def begin(count: int) -> None:
            """No more than there are workers: what a stopped suite waits for."""
            for n, i, s in islice(left, count):
                jobs[pool.submit(cell, n, variants[n], split, i, s, images, device)] = n, i, s

        begin(workers)
        count = 0
        while jobs:
            ended, _ = wait(jobs, return_when=FIRST_COMPLETED)
            for job in ended:
                name, index, _ = jobs.pop(job)
                result = job.result() | {"index": index, "key": keys[name]} | about
                done.append(result)
                log.write(json.dumps(result) + "\n")
                log.flush()
                count += 1
                shown = " ".join(f"{k} {result[k]:.4f}" for k in SCORES)
                told = f"{count}/{len(todo)} {name} {result['subject']} #{result['seed']}: {shown}"
                print(told, flush=True)
            begin(len(ended))
    return [c for c in done if c["index"] < subjects and c["seed"] < seeds]


def committed(suite: str, path: Path) -> list[dict[str, Any]]:
    """The cells of a suite as it is today that `path` (JSON lines) has, on the reported subjects."""
    return _kept(path, {name: fingerprint(resolve(settings), "test", 2) for name, settings in SUITES[suite].items()})


def _kept(path: Path, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """Cells in a file that were made with these variants' settings."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [cell for cell in map(json.loads, lines) if cell["key"] == keys.get(cell["variant"])]


def fingerprint(settings: Settings, split: str, images: int) -> str:
    """What a cell's figures depend on: resolved settings, subjects, pictures, and the embedded weights."""
    digest = _weights().copy()
    digest.update(json.dumps([settings, split, images], sort_keys=True).encode())
    return digest.hexdigest()[:16]


@cache
def _weights() -> hashlib._Hash:
    """Of the embedded weights; its copies go on from there."""
    from mep_lightning.tiny import WEIGHTS

    digest = hashlib.sha256()
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest


def summarise(suite: str, cells: Iterable[dict[str, Any]], variants: Iterable[str]) -> list[Row]:
    """Mean over subjects and seeds, and the spread over seeds of the mean over subjects; the median of seconds.

    Of all variants but the first also the difference from it, paired by subject and seed, and its standard error.
    """
    rows, cells, names = [], list(cells), list(variants)
    for name in names:
        mine = [c for c in cells if c["variant"] == name]
        if not mine:
            continue
        for metric in SCORES:
            seeds = sorted({c["seed"] for c in mine})
            means = [statistics.mean(c[metric] for c in mine if c["seed"] == s) for s in seeds]
            rows.append(row(suite, name, metric, round(statistics.mean(means), 5), ""))
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            rows[-1] |= {"spread": round(spread, 5), "subjects": len({c["subject"] for c in mine}), "seeds": len(seeds)}
            if name != names[0] and (beyond := difference(cells, name, names[0], metric)):
                rows[-1]["beyond_first"] = asdict(beyond)
        rows.append(row(suite, name, "seconds", round(statistics.median(c["seconds"] for c in mine), 1), "s"))
    return rows


def run(suite: str, path: Path, names: list[str] | None = None, **kwargs: Any) -> list[Row]:
    """Run a suite, or the variants of it that are named, and summarise it."""
    known = SUITES[suite]
    variants = {name: known[name] for name in names or known}
    return summarise(suite, run_cells(variants, path, **kwargs), variants)
