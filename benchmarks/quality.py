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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, measured_with, row

SCORES = ("clip_t", "clip_i", "dino", "dino_inter", "heldout_loss")
Settings = dict[str, Any]

BACKPROP: Settings = {
    "method": "textual_inversion",
    "estimator": "Backprop",
    "precision": "fp32",
    "sg": False,
    "puts": False,
}
ZOODIP: Settings = {
    "method": "zoodip",
    "estimator": "RandomGradientEstimator",
    "precision": "int8",
    "normalize": True,
    "sg": True,
    "puts": True,
}
FAST: Settings = ZOODIP | {"method": "zoodip_fast", "normalize": False, "sg": False, "conditioning": True}
LORA: Settings = BACKPROP | {"method": "lora", "adapter": "LoRA"}
SELECTIVE: Settings = LORA | {
    "method": "selective",
    "estimator": "SPSAEstimator",
    "precision": "int8",
    "normalize": True,
    "selector": ["TimestepAwareSelector", {"alpha": 1.0, "beta": 1.0, "warmup": 0.1}],
}
METHODS: dict[str, Settings] = {
    "untrained": BACKPROP | {"max_steps": 0},
    "textual_inversion": BACKPROP,
    "textual_inversion_lite": BACKPROP
    | {"method": "textual_inversion_lite", "precision": "int8", "checkpointing": True},
    "zoodip": ZOODIP,
    "zoodip_fast": FAST,
}
"""Every method with its own values and budget."""
SCALES: Settings = BACKPROP | {"method": "peqa", "adapter": "QuantizationScales", "precision": "int8"}
BASELINES: dict[str, Settings] = {
    "qlora": LORA | {"method": "qlora", "precision": "int4"},
    "peqa": SCALES,
    "tuneqdm": SCALES | {"method": "tuneqdm", "input_channels": True},
    "gf_ti": BACKPROP | {"method": "gf_ti", "estimator": "CMAES", "precision": "int8"},
}
"""Methods of ZOODiP's Table 1 whose values are searched here, and that `mep compare` compares."""
SHORT: Settings = ZOODIP | {"max_steps": 1_000, "puts": False}
PUTS: Settings = {"puts": True, "puts_low": 500, "puts_high": 900}
ABLATION: dict[str, Settings] = {
    "SG": SHORT,
    "no SG": SHORT | {"sg": False},
    "PUTS 500..900, no SG": SHORT | PUTS | {"sg": False},
    "SG, PUTS 500..900": SHORT | PUTS,
    "n=1": SHORT | {"n": 1},
    "n=2": SHORT | {"n": 2},
    "n=4": SHORT | {"n": 4},
    "SPSA": SHORT | {"estimator": "SPSAEstimator"},
    "one-point": SHORT | {"estimator": "OnePointEstimator", "standardize": False},
    "SNR timesteps": SHORT | {"timesteps": "SNRTimesteps"},
    "μ 1e-4": SHORT | {"mu": 1e-4},
    "μ 1e-2": SHORT | {"mu": 1e-2},
}
"""ZOODiP with one part changed, in steps that suffice to tell them apart; the first is what the others vary.

On tiny it draws all timesteps, so PUTS has the paper's bounds for SD1.5 here.
"""
SUBSPACES: dict[str, Settings] = {
    f"τ {tau}, ν {nu:g}": SHORT | {"tau": tau, "nu": nu}
    for tau in (8, 16, 32, 64, 128)
    for nu in (1e-1, 1e-2, 1e-3, 1e-4)
}
"""The settings of Subspace Gradient (ZOODiP's Table 4), for a token of 128 dimensions instead of 768."""
RANGES: dict[str, Settings] = {
    f"{low}..{high}": BACKPROP | {"puts": True, "puts_low": low, "puts_high": high}
    for low in range(0, 1000, 250)
    for high in range(low + 250, 1001, 250)
}
TIMESTEPS: dict[str, Settings] = RANGES | {
    "dreambooth": BACKPROP | {"method": "dreambooth", "adapter": "FullUNet"},
    "dreambooth, 500..1000": BACKPROP
    | {"method": "dreambooth", "adapter": "FullUNet", "puts": True, "puts_low": 500, "puts_high": 1000},
}
"""Textual Inversion on part of the timesteps (ZOODiP's Figures 4 and 7), and DreamBooth (its Table S7)."""
PRECISIONS: dict[str, Settings] = {
    precision: SHORT | {"precision": precision} for precision in ("fp32", "bf16", "int8", "int4")
}
"""ZOODiP on the base in every precision, with the mu that each wants."""
CARRIED: Settings = SHORT | {"estimator": "ForwardGradientEstimator"}
FORWARD: dict[str, Settings] = {
    "fp32, finite difference": SHORT | {"precision": "fp32"},
    "fp32, tangents": CARRIED | {"precision": "fp32"},
    "bf16, finite difference, μ 1e-3": SHORT | {"precision": "bf16", "mu": 1e-3},
    "bf16, finite difference, its best μ": SHORT | {"precision": "bf16"},
    "bf16, tangents": CARRIED | {"precision": "bf16"},
    "int8, bf16 activations, tangents": CARRIED | {"activations": "bf16"},
    "int8, int8 activations, tangents": CARRIED | {"activations": "int8"},
}
"""What half precision does to a training by finite differences and by tangents; otherwise as `PRECISIONS`."""
FRACTIONS = (0.202, 0.43, 0.502, 0.702, 0.901)
"""Cuts of tiny's U-Net (`bases.units.cuts`), as shares of its parameters."""
FALLING = {"selector": ["TimestepAwareSelector", {"alpha": 1.0, "beta": 1.0, "warmup": 0.1, "falling": True}]}
LORAS: dict[str, Settings] = {
    "untrained": LORA | {"max_steps": 0},
    "dreambooth": LORA | {"method": "dreambooth", "adapter": "FullUNet"},
    "lora": LORA,
    "lora_r1": LORA | {"method": "lora_r1"},
    **{f"hollowed {share:.0%}": LORA | {"method": "hollowed_net", "fraction": share} for share in FRACTIONS},
    "selective": SELECTIVE,
    "BP-low alone": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.0}]},
    "ZO-high alone": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 1.0}]},
    "constant probability": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.25}]},
    "step-wise switch": SELECTIVE | {"selector": ["StepwiseSelector", {"switch": 0.75}]},
    "selective, falling with t": SELECTIVE | FALLING,
    "selective, low at 32 px": SELECTIVE | {"low_resolution": 32},
    "BP-low alone, at 32 px": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.0}], "low_resolution": 32},
    "selective, falling with t, low at 32 px": SELECTIVE | FALLING | {"low_resolution": 32},
}
"""LoRA whole, hollowed, and selectively optimised; the selectors take ZO-high about as often as one another.

Half the side, as the paper has it, leaves 2 x 2 latents in the middle of tiny's U-Net; its default is three quarters.
"""
SUITES = {
    "quality": METHODS,
    "ablation": ABLATION,
    "subspace": SUBSPACES,
    "timesteps": TIMESTEPS,
    "precision": PRECISIONS,
    "forward": FORWARD,
    "loras": LORAS,
}
SWITCHES = {"sg": ("tau", "nu"), "conditioning": ("share", "every"), "puts": ("puts_low", "puts_high")}
"""Parts that a variant may lack, and the settings that are theirs."""
PROJECTIONS = {"sg": "SubspaceGradient", "conditioning": "ConditioningSubspace"}


def resolve(settings: Settings) -> Settings:
    """Everything that a variant's figures depend on: its settings, and the defaults where it has none."""
    from mep_lightning import defaults, estimators

    narrowing = settings["method"] if settings["method"] in defaults.TOKENS else "zoodip"
    bounds = {key: defaults.lookup(narrowing, "tiny", "int8")[key] for key in SWITCHES["puts"]}
    part = parameters_of(estimators.ConditioningSubspace) if settings.get("conditioning") else {}
    resolved = defaults.lookup(settings["method"], "tiny", settings["precision"]) | bounds | part | settings
    unused = {key for switch, keys in SWITCHES.items() if not settings.get(switch) for key in keys}
    unused.add("sampling_batch")  # every cell draws in the same batches, and a picture is the same in any
    return {key: value for key, value in resolved.items() if key not in unused}


def parameters_of(kind: Any) -> Settings:
    """A part's settings with their default values."""
    return {key: one.default for key, one in signature(kind).parameters.items()}


@contextmanager
def photos_of(who: Any) -> Iterator[str]:
    """A subject's photos in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for i, photo in enumerate(who.photos()):
            photo.save(Path(folder) / f"{i}.png")
        yield folder


def train(settings: Settings, data: Any, seed: int, folder: str, watching: Iterable[Any] = ()) -> Any:
    """One run of one method through a Trainer, with resolved settings.

    Args:
        settings: as `resolve` answers.
        data: a `SubjectData`.
        seed: of everything that is drawn.
        folder: for what the run keeps meanwhile.
        watching: more callbacks.

    Returns:
        The trained module.
    """
    from lightning import Trainer

    from mep_lightning import PersonalizationModule, adapters, selection, timesteps
    from mep_lightning import estimators as parts
    from mep_lightning.callbacks import PUTS, HollowedActivations

    def part(kind: Any) -> Any:
        return kind(**{key: settings[key] for key in signature(kind).parameters if key in settings})

    selector = settings.get("selector")
    module = PersonalizationModule(
        precision=settings["precision"],
        adapter=part(getattr(adapters, settings.get("adapter", "TokenEmbedding"))),
        estimator=part(getattr(parts, settings["estimator"])),
        subspace=next((part(getattr(parts, PROJECTIONS[key])) for key in PROJECTIONS if settings.get(key)), None),
        timesteps=getattr(timesteps, settings["timesteps"])() if "timesteps" in settings else None,
        selector=getattr(selection, selector[0])(**selector[1]) if selector else None,
        low_resolution=settings.get("low_resolution"),
        checkpointing=settings.get("checkpointing", False),
        activations=settings.get("activations", "auto"),
        lr=settings["lr"],
        lr_scheduler=settings["lr_scheduler"],
        eps=settings["eps"],
        seed=seed,
        method=settings["method"],
    )
    if settings["max_steps"] == 0:
        module.class_word = data.class_word
        module.load()
        return module
    callbacks: list[Any] = [PUTS(settings["puts_low"], settings["puts_high"])] if settings["puts"] else []
    if "fraction" in settings:
        callbacks.append(HollowedActivations(settings["fraction"], settings["samples"], folder=folder))
    trainer = Trainer(
        max_steps=settings["max_steps"],
        callbacks=[*callbacks, *watching],
        accelerator="cpu",
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
    with torch.no_grad(), base.borrowed_vae() as vae:
        posterior = vae.encode((other_photos(subject, draws) * 2 - 1).to(base.dtype)).latent_dist
        latents = sample_latents(posterior.mean, posterior.std, torch.zeros_like(posterior.mean), base.scaling_factor)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.linspace(20, 980, draws).long()
        noisy = base.scheduler.add_noise(latents.float(), noise, timestep)
        prompt = f"a photo of a {module.adapter.phrase(subject.class_word)}"
        embeds = encode_prompts(base, [prompt], module.adapter.tokens()).expand(draws, -1, -1)
        with module.drawing():
            return (base.unet(noisy.to(base.dtype), timestep, embeds).sample.float() - noise).pow(2).mean().item()


def cell(variant: str, settings: Settings, split: str, index: int, seed: int, images: int) -> dict[str, Any]:
    """Train and score one cell, with resolved settings."""
    _quiet()
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
        module = train(settings, data, seed, f"{folder}/kept")
        seconds = time.monotonic() - began
    token = module.adapter.token
    prompts = [p.format(token, who.class_word) for p in evaluation_prompts() for _ in range(images)]
    seeds = [i % images + 1000 * seed for i in range(len(prompts))]
    steps, guidance = settings["sampling_steps"], settings["guidance"]
    pictures = generate(module, prompts, seeds, steps=steps, guidance=guidance, batch_size=16)
    scores = evaluate(pictures, prompts, who.photos(), clip=CLIP, dino=DINO, token=token)
    scores["heldout_loss"] = heldout_loss(module, who)
    return {"variant": variant, "subject": who.name, "split": split, "seed": seed, "seconds": seconds, **scores}


def _quiet() -> None:
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
) -> list[dict[str, Any]]:
    """All cells that `path` (JSON lines) lacks, in worker processes of one thread each; returns every cell."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    variants = {name: resolve(settings) for name, settings in variants.items()}
    keys = {name: fingerprint(settings, split, images) for name, settings in variants.items()}
    have = {(c["variant"], c["index"], c["seed"]) for c in done if c["key"] == keys.get(c["variant"])}
    todo = [
        (name, index, seed)
        for seed in range(seeds)
        for index in range(subjects)
        for name in variants
        if (name, index, seed) not in have
    ]
    about = measured_with(threads=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as log:
        jobs = {pool.submit(cell, n, variants[n], split, i, s, images): (n, i, s) for n, i, s in todo}
        for count, job in enumerate(as_completed(jobs), 1):
            result = job.result() | {"index": jobs[job][1], "key": keys[jobs[job][0]]} | about
            done.append(result)
            log.write(json.dumps(result) + "\n")
            log.flush()
            shown = " ".join(f"{k} {result[k]:.4f}" for k in SCORES)
            print(f"{count}/{len(todo)} {result['variant']} {result['subject']} #{result['seed']}: {shown}", flush=True)
    wanted = [c for c in done if c["key"] == keys.get(c["variant"])]
    return [c for c in wanted if c["index"] < subjects and c["seed"] < seeds]


def fingerprint(settings: Settings, split: str, images: int) -> str:
    """What a cell's figures depend on: resolved settings, subjects, pictures, and the embedded weights."""
    from mep_lightning.tiny import WEIGHTS

    digest = hashlib.sha256()
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    digest.update(json.dumps([settings, split, images], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def summarise(suite: str, cells: Iterable[dict[str, Any]], variants: Iterable[str]) -> list[Row]:
    """Mean over subjects and seeds, and the spread over seeds of the mean over subjects; the median of seconds."""
    rows, cells = [], list(cells)
    for name in variants:
        mine = [c for c in cells if c["variant"] == name]
        if not mine:
            continue
        for metric in SCORES:
            seeds = sorted({c["seed"] for c in mine})
            means = [statistics.mean(c[metric] for c in mine if c["seed"] == s) for s in seeds]
            rows.append(row(suite, name, metric, round(statistics.mean(means), 5), ""))
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            rows[-1] |= {"spread": round(spread, 5), "subjects": len({c["subject"] for c in mine}), "seeds": len(seeds)}
        rows.append(row(suite, name, "seconds", round(statistics.median(c["seconds"] for c in mine), 1), "s"))
    return rows


def run(suite: str, path: Path, names: list[str] | None = None, **kwargs: Any) -> list[Row]:
    """Run a suite, or the variants of it that are named, and summarise it."""
    known = SUITES[suite]
    variants = {name: known[name] for name in names or known}
    return summarise(suite, run_cells(variants, path, **kwargs), variants)
