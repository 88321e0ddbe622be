"""`soak`: thousands of steps in one process; memory and speed must stay where they were."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.rows import Row, row
from mep_lightning.commands.request import read_request

STEPS, SAMPLES = 20_000, 200
SETTLED = 0.1
"""The share of the steps that are passed over first: caches fill, the subspace's path is laid out."""
GROWTH = 0.01
"""Memory is flat if, with twice its slope's error, it grows by less than this share of itself in `STEPS` steps."""
SLOWING = 0.05
"""Speed is flat if, with twice its slope's error, it falls by less than this share of itself in `STEPS` steps."""
FLAT, UNDECIDED, CHANGES = 1, 0, -1
"""Verdicts: where it is not flat, it changes if its slope is beyond twice its error, and else the run was too short."""


@dataclass(frozen=True)
class Slope:
    """A straight line through figures over steps.

    Attributes:
        value: by how much they grow in `STEPS` steps.
        error: its standard error, neighbours' likeness taken into account.
        mean: of the figures.
    """

    value: float
    error: float
    mean: float

    def verdict(self, share: float, sign: int) -> int:
        """Whether it may grow (sign 1) or fall (sign -1) by a share of the mean."""
        if (sign * self.value + 2 * self.error) / self.mean < share:
            return FLAT
        return CHANGES if sign * self.value > 2 * self.error else UNDECIDED


def fit_slope(steps: Sequence[float], figures: Sequence[float]) -> Slope:
    """Least squares; the error is widened by sqrt((1 + r) / (1 - r)), r the residuals' likeness to their neighbours."""
    x = torch.tensor(steps, dtype=torch.float64) / STEPS
    y = torch.tensor(figures, dtype=torch.float64)
    dx = x - x.mean()
    slope = (dx @ y / (dx @ dx)).item()
    residuals = y - y.mean() - slope * dx
    spread = (residuals @ residuals).item()
    error = math.sqrt(spread / max(len(steps) - 2, 1) / (dx @ dx).item())
    likeness = (residuals[1:] @ residuals[:-1]).item() / spread if spread > 0 else 0.0
    likeness = min(max(likeness, 0.0), 0.99)
    return Slope(slope, error * math.sqrt((1 + likeness) / (1 - likeness)), y.mean().item())


class Watch(Callback):
    """Notes the process's memory, and the seconds of its processor, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        self.resident: list[float] = []
        self.speeds: list[float] = []
        self._process, self._before = psutil.Process(), (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = trainer.global_step, time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step % self.every:
            return
        now = time.process_time()
        self.steps.append(step)
        self.resident.append(self._process.memory_info().rss / 2**20)
        self.speeds.append((step - self._before[0]) / (now - self._before[1]))
        self._before = step, now


def run(steps: int = STEPS, method: str = "zoodip") -> list[Row]:
    """Train for so many steps on the embedded base, as `mep fit` does, checkpoints and log included.

    Args:
        steps: how many.
        method: the recipe.
    """
    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.commands.training import FitCLI

    with tempfile.TemporaryDirectory() as folder:
        words = ["--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"]
        words += ["--model.base", "tiny", "--samples.count", "1", "--samples.every", "0"]
        quiet_after_imports()
        request = read_request([method], words, str(Path(folder, "run")), resume=False)
        cli = FitCLI(request)
        watch = Watch(max(steps // SAMPLES, 1))
        cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        began = time.monotonic()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, weights_only=True)
        seconds = time.monotonic() - began
    return rows(f"{method} on tiny", watch, steps, seconds)


def rows(case: str, watch: Watch, steps: int, seconds: float) -> list[Row]:
    """The figures of a run, and the verdicts."""
    first = int(SETTLED * len(watch.steps))
    settled = watch.steps[first:]
    memory, speed = fit_slope(settled, watch.resident[first:]), fit_slope(settled, watch.speeds[first:])
    figures = [
        ("steps", steps, "steps"),
        ("wall time", seconds, "s"),
        ("resident memory", memory.mean, "MiB"),
        ("resident memory, slope", memory.value, f"MiB / {STEPS} steps"),
        ("resident memory, error of the slope", memory.error, f"MiB / {STEPS} steps"),
        ("resident memory, verdict", memory.verdict(GROWTH, 1), "1 flat, 0 undecided, -1 grows"),
        ("speed", speed.mean, "steps / s of the processor"),
        ("speed, slope", speed.value, f"steps / s / {STEPS} steps"),
        ("speed, error of the slope", speed.error, f"steps / s / {STEPS} steps"),
        ("speed, verdict", speed.verdict(SLOWING, -1), "1 flat, 0 undecided, -1 falls"),
    ]
    found = [row("soak", case, metric, value, unit) for metric, value, unit in figures]
    found.append({**row("soak", case, "samples", len(watch.steps), "samples"), "resident_mib": watch.resident})
    found[-1] |= {"steps": watch.steps, "steps_per_second": watch.speeds}
    return found
