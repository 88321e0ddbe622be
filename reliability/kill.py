"""`kill`: runs of `mep fit` are killed at random moments and resumed; they must export what a run does that was not.

A process is forked from one that has imported everything, so that moments fall on a run's work. Every other kill comes
at a random time; the others come while a file is being written, when a temporary is seen in the run's folder.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, row
from mep_lightning.run_folder import TEMPORARY, RunFolder

PRELOADED = ["mep_lightning.commands.fit", "mep_lightning.commands.training", "mep_lightning.evaluation.plots"]
PATIENCE = 300.0
"""Seconds after which a run that is not killed should long be done."""
AGAIN = 0.6
"""The chance that a resumed run is killed once more."""
WRITES = 12
"""A kill that waits for a write takes one of so many first."""
LOOK = 0.0005
"""Seconds between two looks for a temporary."""
SHORT = (
    *("--model.base", "tiny", "--samples.count", "1", "--samples.every", "10", "--samples.steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "5", "--no-plan"),
)
METHODS: dict[str, tuple[str, ...]] = {
    "zoodip": (
        "--config",
        "zoodip",
        "--trainer.max_steps",
        "40",
        "--checkpoint.every",
        "5",
        "--model.subspace.tau",
        "8",
    ),
    "lora": (
        *("--config", "lora", "--trainer.max_steps", "12", "--checkpoint.every", "3"),
        *("--model.adapter.init_args.rank", "4"),
    ),
    "hollowed_net": (
        *("--config", "hollowed_net", "--config", "short.yaml", "--trainer.max_steps", "10"),
        *("--checkpoint.every", "3", "--model.adapter.init_args.rank", "4"),
    ),
}
"""What is killed: a token in forward passes, a LoRA, and one that makes activations ready before it trains."""
HOLLOW = "trainer: {callbacks: [{class_path: HollowedActivations, init_args: {fraction: auto, samples: 48}}]}\n"
PHASES = ("before its settings are kept", "loading", "stage 1", "training", "after the last step")
WHEN = ("at a random time", "while a file is written")


@dataclass
class Tally:
    """What became of one method's runs."""

    phases: Counter[str] = field(default_factory=Counter)
    whens: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    half_written: int = 0
    lost: int = 0
    differing: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.phases.values())


class Victim:
    """One run in its own folder.

    Args:
        folder: an empty folder to work in; the run is its `run`.
        words: the command line that begins it.
    """

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        (folder / "short.yaml").write_text(HOLLOW)
        self.folder, self.run = folder, RunFolder(folder / "run")
        self._begin = ["fit", *words, *SHORT, "--run", "run"]
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self) -> Any:
        """The process that begins the run, or carries it on."""
        resumes = self.run.config.is_file()
        words = ["fit", "--run", "run", "--resume", "--no-plan"] if resumes else self._begin
        process = self._context.Process(target=_attempt, args=(str(self.folder), words))
        process.start()
        return process

    @property
    def phase(self) -> str:
        """How far the run is, by what its folder holds."""
        if not self.run.config.is_file():
            return PHASES[0]
        if not self.run.last_checkpoint.is_file():
            if self.run.activations.is_dir():
                return PHASES[2]
            return PHASES[3] if (self.run.samples / "before.png").is_file() else PHASES[1]
        return PHASES[4] if (self.run.samples / "after.png").is_file() or _is_at_end(self.run) else PHASES[3]


def _attempt(folder: str, words: list[str]) -> None:
    """What the process does."""
    from mep_lightning.cli import main

    os.chdir(folder)
    with open("log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(main(words))


def _is_at_end(run: RunFolder) -> bool:
    import torch
    import yaml

    steps = yaml.safe_load(run.config.read_text())["trainer"]["max_steps"]
    return bool(torch.load(run.last_checkpoint, weights_only=True)["global_step"] == steps)


def broken(root: Path) -> list[str]:
    """Files that stand under their own name and are not whole."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith(TEMPORARY):
            try:
                _read(path)
            except Exception as error:  # whatever a half-written file makes its reader raise
                found.append(f"{path.relative_to(root)}: {type(error).__name__}")
    return found


def _read(path: Path) -> None:
    import torch
    import yaml
    from PIL import Image
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".ckpt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".yaml":
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")


def made(run: RunFolder) -> dict[str, Any]:
    """What a run has made, to be compared: every export's header and bytes, and the pictures at its end."""
    found: dict[str, Any] = {"after.png": (run.samples / "after.png").read_bytes()}
    for path in sorted(run.adapter.rglob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])  # its keys come in any order
        found[str(path.relative_to(run.root))] = header, content[8 + size :]
    return found


def run(kills: int = 50, seed: int = 0, methods: Sequence[str] = tuple(METHODS)) -> list[Row]:
    """Kill so many times, in turn over the methods.

    Args:
        kills: how often.
        seed: of the moments.
        methods: of `METHODS`.
    """
    rng, tallies = random.Random(f"kill {seed}"), {name: Tally() for name in methods}
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = {}, {}
        for name in methods:
            victim = Victim(Path(folder, f"{name}-whole"), METHODS[name])
            began = time.monotonic()
            if not _finish(victim, tallies[name]):
                raise RuntimeError(f"{name} does not train: {tallies[name].told}")
            whole[name], seconds[name] = made(victim.run), time.monotonic() - began
        while (left := kills - sum(tally.kills for tally in tallies.values())) > 0:
            name = min(methods, key=lambda one: tallies[one].kills)
            victim = Victim(Path(folder, f"{name}-{tallies[name].runs}"), METHODS[name])
            _chain(victim, tallies[name], rng, seconds[name], left)
            if _finish(victim, tallies[name]):
                same = made(victim.run) == whole[name]
                tallies[name].differing += not same
    for tally in tallies.values():
        print(*tally.told, sep="\n", end="\n" if tally.told else "")
    return [one for name, tally in tallies.items() for one in _rows(name, tally)]


def _chain(victim: Victim, tally: Tally, rng: random.Random, seconds: float, most: int) -> None:
    """Kill a run, and what resumes it, up to `most` times."""
    tally.runs += 1
    for number in range(most):
        if number and rng.random() > AGAIN:
            return
        when = WHEN[rng.random() < 0.5]
        moment, writes = rng.uniform(0, seconds), rng.randint(1, WRITES)
        process = victim.start()
        is_due = _after(moment, process) if when == WHEN[0] else _at_write(victim.run.root, writes, process)
        if not is_due:
            return  # it was done before
        process.kill()
        process.join()
        tally.phases[victim.phase] += 1
        tally.whens[when] += 1
        if found := broken(victim.run.root):
            tally.half_written += len(found)
            tally.told += found


def _after(seconds: float, process: Any) -> bool:
    process.join(seconds)
    return process.is_alive()


def _at_write(root: Path, count: int, process: Any) -> bool:
    """Wait until so many files were seen being written; whether the process still is about it."""
    seen: set[str] = set()
    while process.is_alive():
        seen.update(_temporaries(root))
        if len(seen) >= count:
            return process.is_alive()
        time.sleep(LOOK)
    return False


def _temporaries(root: Path) -> list[str]:
    """Files being written; one that is written anew counts anew, by its inode."""
    found = []
    for folder in (root, root / "checkpoints", root / "adapter", root / "samples", root / "activations"):
        try:
            with os.scandir(folder) as entries:
                found += [f"{one.path} {one.inode()}" for one in entries if one.name.startswith(TEMPORARY)]
        except OSError:
            continue
    return found


def _finish(victim: Victim, tally: Tally) -> bool:
    """Let the run come to its end; False, and a lost run, where it does not."""
    process = victim.start()
    process.join(PATIENCE)
    is_there = (victim.run.samples / "after.png").is_file() and victim.run.adapter.is_dir()
    is_clean = not broken(victim.run.root) and not _temporaries(victim.run.root)
    if process.exitcode == 0 and is_there and is_clean:
        return True
    if process.is_alive():
        process.kill()
        process.join()
    tally.lost += 1
    tally.told.append(f"status {process.exitcode}: {(victim.folder / 'log.txt').read_text()[-600:]}")
    return False


def _rows(name: str, tally: Tally) -> list[Row]:
    figures = [("kills", tally.kills), ("runs", tally.runs), *((phase, tally.phases[phase]) for phase in PHASES)]
    figures += [(when, tally.whens[when]) for when in WHEN]
    figures += [("half-written files under a final name", tally.half_written), ("lost runs", tally.lost)]
    figures += [("runs with another export", tally.differing)]
    return [row("kill", name, metric, value, "count") for metric, value in figures]
