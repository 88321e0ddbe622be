"""What a damaged file is fed to: the functions that the commands read such a file with."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from mep_lightning import SubjectData
from mep_lightning.adapters import LoRA, QuantizationScales, TokenEmbedding
from mep_lightning.bases import load_base
from mep_lightning.bases.tokens import token_rows
from mep_lightning.commands.keeping import RunLog, read_checkpoint
from mep_lightning.commands.learned import open_learned
from mep_lightning.commands.recipes import recipes_folder
from mep_lightning.commands.request import read_request
from mep_lightning.commands.training import FitCLI, train
from mep_lightning.comparison import table
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.evaluation import write_report
from mep_lightning.hollow import _done
from mep_lightning.run_folder import RunFolder
from mep_lightning.templates import fill
from mep_lightning.tiny import sample_photos
from reliability import mutations

PHOTOS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
RECIPES = ("zoodip", "textual_inversion", "lora", "hollowed_net", "selective", "quickstart", "tuneqdm")
LARGE = 8 * 2**30
"""Bytes of a file of holes."""
DEEPER = 0.15
"""The share of checkpoints that a whole run is resumed from; the others are read alone."""


class Feeder:
    """Damages files and has them read.

    Args:
        reference: a finished run.
    """

    def __init__(self, reference: Path) -> None:
        self.reference = RunFolder(reference)
        self.photos = _photos()
        self.bases = {precision: load_base("tiny", precision, vae=False) for precision in ("fp32", "int8")}
        self.exports = self._made_exports()
        self.checkpoint = torch.load(self.reference.last_checkpoint, weights_only=True)
        self.recipes = [yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text()) for name in RECIPES]
        self.kinds: dict[str, Callable[[random.Random, Path, list[str]], None]] = {
            "photos": self._photos_of,
            "captions": self._captions,
            "recipe": self._recipe,
            "export": self._export,
            "checkpoint": self._checkpoint,
            "run folder": self._run_folder,
        }

    def feed(self, kind: str, rng: random.Random, folder: Path, what: list[str]) -> None:
        """Damage something of a kind and read it; `what` is told what is done before it is done."""
        self.kinds[kind](rng, folder, what)

    # -- photos --------------------------------------------------------------------------------------------------------

    def _photos_of(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        suffix = rng.choice(list(PHOTOS))
        path = folder / f"0.{suffix}"
        (folder / "1.png").write_bytes(self.photos["png"])
        chance = rng.random()
        if chance < 0.1:
            what[0] = "a bomb"
            path.write_bytes(mutations.bomb(rng))
        elif chance < 0.18:
            what[0] = _no_plain_file(path, rng)
        else:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of {suffix}"
            path.write_bytes(damage(self.photos[suffix], rng))
        _read_photos(folder)

    def _captions(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        (folder / "0.png").write_bytes(self.photos["png"])
        path = folder / rng.choice(["metadata.jsonl", "0.txt"])
        good = b'{"file_name": "0.png", "text": "a photo of a sks ball on grass"}\n'
        chance = rng.random()
        if chance < 0.35:
            number = rng.randrange(len(mutations.JSONS))
            what[0] = f"{path.name}, JSON {number}"
            path.write_bytes(mutations.JSONS[number])
        elif chance < 0.5:
            what[0] = _no_plain_file(path, rng)
        else:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of {path.name}"
            path.write_bytes(damage(good * rng.choice([1, 3]), rng))
        for text in _read_photos(folder):
            named = fill(text, "<sks> ball", "ball")
            named.encode()
            token_rows(self.bases["fp32"].tokenizers[0], [named])

    # -- settings ------------------------------------------------------------------------------------------------------

    def _recipe(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        path = folder / "mine.yaml"
        recipe = rng.choice(self.recipes)
        chance = rng.random()
        if chance < 0.15:
            number = rng.randrange(len(mutations.YAMLS))
            what[0] = f"YAML {number}"
            path.write_bytes(mutations.YAMLS[number])
        elif chance < 0.2:
            what[0] = _no_plain_file(path, rng)
        elif chance < 0.4:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of a recipe"
            path.write_bytes(damage(yaml.safe_dump(recipe).encode(), rng))
        else:
            damaged = mutations.damage_tree(recipe, rng)
            what[0] = f"settings {_difference(recipe, damaged)}"
            path.write_text(yaml.safe_dump(damaged, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        base = ["--config", "zoodip"] if rng.random() < 0.3 else []
        _read_settings([*base[1:], str(path)], folder / "run")

    # -- exports -------------------------------------------------------------------------------------------------------

    def _made_exports(self) -> dict[str, bytes]:
        """Files of a token, a LoRA and scales, as `mep fit` writes them."""
        made = {}
        for adapter in (TokenEmbedding(init="ball"), LoRA(rank=1), QuantizationScales()):
            adapter.attach(self.bases["int8"], "ball")
            folder = Path("made")
            adapter.export(folder)
            made[adapter.FILES[0]] = (folder / adapter.FILES[0]).read_bytes()
            adapter.detach()
            shutil.rmtree(folder)
        return made

    def _export(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        name = rng.choice(sorted(self.exports))
        path, content = folder / name, self.exports[name]
        chance = rng.random()
        if chance < 0.35:
            what[0] = f"a header of {name}"
            path.write_bytes(mutations.safetensors_header(content, rng))
        elif chance < 0.6:
            what[0] = f"odd tensors of {name}"
            path.write_bytes(content)
            tensors = load_file(path)
            metadata = {"mep.token": "<sks>", "mep.base": "tiny", "mep.precision": rng.choice(["int8", "fp32", "x"])}
            metadata["mep.hollowed"] = rng.choice(["0.39", "x", "nan", "-1", "1e400"]) if rng.random() < 0.3 else "0.43"
            path.unlink()
            save_file(mutations.odd_tensors(tensors, rng), path, metadata)
        elif chance < 0.65:
            what[0] = _no_plain_file(path, rng)
        else:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of {name}"
            path.write_bytes(damage(content, rng))
        self._open(folder)

    def _open(self, folder: Path) -> None:
        """As `mep predict` opens it, up to the first picture."""
        learned = open_learned(folder, base="tiny")
        learned.prompt("a photo of a {}")
        base = self.bases["int8" if learned.module.precision == "int8" else "fp32"]
        try:
            learned.module.take(base)
            learned.module.condition_on([learned.prompt("a photo of a {}")])
        finally:
            learned.module.adapter.detach()
            base.guest = None

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _copied(self, folder: Path) -> RunFolder:
        run = RunFolder(folder / "run")
        shutil.copytree(self.reference.root, run.root)
        return run

    def _checkpoint(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        run = self._copied(folder)
        shutil.rmtree(run.adapter)
        chance = rng.random()
        if chance < 0.3:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of a checkpoint"
            run.last_checkpoint.write_bytes(damage(run.last_checkpoint.read_bytes(), rng))
        elif chance < 0.35:
            what[0] = "a pickle that calls"
            torch.save({**self.checkpoint, "callbacks": Malice()}, run.last_checkpoint)
        elif chance < 0.4:
            run.last_checkpoint.unlink()
            what[0] = _no_plain_file(run.last_checkpoint, rng)
        elif chance < 0.65:
            what[0] = "odd tensors in a checkpoint"
            torch.save(mutations.damage_tensors(self.checkpoint, rng), run.last_checkpoint)
        else:
            damaged = mutations.damage_tree(self.checkpoint, rng)
            what[0] = f"a checkpoint {_difference(self.checkpoint, damaged)}"
            torch.save(damaged, run.last_checkpoint)
        if rng.random() < DEEPER:
            words = ["--trainer.max_steps", "5", "--trainer.enable_progress_bar", "false", "--samples.steps", "1"]
            train(read_request([], words, str(run.root), resume=True), planned=False)
        else:
            read_checkpoint(run.last_checkpoint)
            self._open(run.root)

    def _run_folder(self, rng: random.Random, folder: Path, what: list[str]) -> None:
        run = self._copied(folder)
        names = ["config.yaml", "log.csv", "memory.json", "metrics.json", "samples/before.png", "samples/after.png"]
        path = run.root / rng.choice([*names, "samples/step-000002.png", "activations/activations.json", "cells.jsonl"])
        path.parent.mkdir(exist_ok=True)
        good = path.read_bytes() if path.is_file() else b'{"method": "lora", "subject": "a", "seed": 0, "key": "x"}'
        path.unlink(missing_ok=True)
        chance = rng.random()
        if chance < 0.3 and path.suffix in (".json", ".jsonl"):
            number = rng.randrange(len(mutations.JSONS))
            what[0] = f"{path.name}, JSON {number}"
            path.write_bytes(mutations.JSONS[number])
        elif chance < 0.6 and path.suffix in (".json", ".yaml"):
            settings = yaml.safe_load(good)
            damaged = mutations.damage_tree(settings, rng)
            what[0] = f"{path.name} {_difference(settings, damaged)}"
            text = json.dumps(damaged, default=str) if path.suffix == ".json" else yaml.safe_dump(damaged)
            path.write_text(text)
        elif chance < 0.65:
            what[0] = f"{path.name}, {_no_plain_file(path, rng)}"
        else:
            damage = rng.choice(mutations.BYTES)
            what[0] = f"{damage.__name__} of {path.name}"
            path.write_bytes(damage(good, rng))
        write_report(run)
        RunLog(run).log_metrics({"train/loss": 0.5, "epoch": 0}, step=5)
        _done(run.activations / "activations.json", run.activations / "activations.bin", "x", 3)
        if path.suffix == ".jsonl":
            records = ComparisonFolder(run.root).records().values()
            table.as_markdown(table.rows(records, ["lora"], {}))
        if path.name == "config.yaml":
            _read_settings([], run.root, resume=True)
        self._open(run.root)


class Malice:
    """What a pickle must not be let do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("../escaped",)


def _photos() -> dict[str, bytes]:
    """A sample photo in every format."""
    (_, image), *_ = sample_photos()[0]
    made = {}
    for suffix, kind in PHOTOS.items():
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        made[suffix] = buffer.getvalue()
    return made


def _read_photos(folder: Path) -> list[str]:
    """As `mep fit` reads them, up to the autoencoder; the prompts."""
    data = SubjectData(folder, class_word="ball")
    data.token = "sks"
    data.setup("fit")
    data.thumbnails(64)
    return data.texts


def _read_settings(configs: list[str], run: Path, resume: bool = False) -> None:
    """As `mep fit` reads them, up to the photos."""
    words = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "9"]
    cli = FitCLI(read_request(configs, words, str(run), resume))
    cli.datamodule.setup("fit")
    cli.datamodule.summary()


def _no_plain_file(path: Path, rng: random.Random) -> str:
    """A link, a folder, a pipe or a file of holes where a file is looked for; what it is."""
    kind = rng.choice(
        ["a loop", "a broken link", "a link to a device", "a folder", "a pipe", "a file of holes", "a link"]
    )
    if kind == "a loop":
        path.symlink_to(path.name)
    elif kind == "a broken link":
        path.symlink_to("../../x")
    elif kind == "a link to a device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to("/etc/passwd")
    else:
        with open(path, "wb") as file:
            file.truncate(LARGE)
    return f"{path.name} is {kind}"


def _difference(before: Any, after: Any) -> str:
    """The first place in which two trees differ, and what stands there now."""
    if not isinstance(after, type(before)):
        return f"are {str(after)[:60]!r}"
    for path in mutations.places(before):
        try:
            old, new = mutations._at(before, path), mutations._at(after, path)
        except (KeyError, IndexError, TypeError):
            return f"without {'.'.join(map(str, path))}"
        if not isinstance(old, (dict, list, torch.Tensor)) and (type(old) is not type(new) or old != new):
            return f"with {'.'.join(map(str, path))} = {str(new)[:60]!r}"
        if isinstance(old, (dict, list)) and not isinstance(new, type(old)):
            return f"with {'.'.join(map(str, path))} = {str(new)[:60]!r}"
    return "with something more"
