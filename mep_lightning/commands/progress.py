"""The live line of `mep fit`: loss, steps a second, memory and time left."""

from __future__ import annotations

import os
import sys
from typing import Any

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepProgress(ProgressBar):
    """One line over all steps of the run; epochs mean nothing to a handful of photos.

    Where the output is no terminal (a log file, CI), a new line comes every half minute instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        live = sys.stderr.isatty()
        self._bar = tqdm(
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            unit="step",
            mininterval=0.2 if live else 30,
            miniters=None if live else 1,
            ncols=_columns(),
            nrows=20,  # tqdm hides its line on a terminal that says it has none
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            file=sys.stderr if live else _Lines(),
            smoothing=0.1,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._bar is None:
            return
        steps = trainer.global_step - self._bar.n
        due = self._bar._time() - self._bar.last_print_t >= self._bar.mininterval
        if due or self._bar.last_print_n == self._bar.initial:  # reading the loss waits for a GPU: seldom
            self._bar.set_postfix_str(self._postfix(trainer), refresh=False)
            self._bar.ncols = _columns()
        self._bar.update(steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None and not trainer.should_stop:
            self._bar.set_postfix_str(self._postfix(trainer), refresh=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the line rather than into it."""
        if self._bar is None:
            print(*args, **kwargs)
        else:
            self._bar.write(kwargs.get("sep", " ").join(map(str, args)), file=sys.stdout)

    def _postfix(self, trainer: Trainer) -> str:
        loss = trainer.callback_metrics.get("train/loss")
        shown = [] if loss is None else [f"loss {float(loss):.3f}"]
        module = getattr(trainer, "lightning_module", None)
        skipped = getattr(getattr(module, "skipped", None), "total", 0)
        shown += [f"{skipped} skipped"] if skipped else []
        return ", ".join([*shown, memory_in_use(trainer.strategy.root_device)])

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _columns() -> int:
    """The terminal's width now; some pseudo-terminals say 0."""
    columns = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    return columns - 1 if columns > 1 else 100


class _Lines:
    """Stands in for a terminal in tqdm: every redrawing that shows something new becomes a line of its own."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            sys.stderr.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        sys.stderr.flush()


def memory_in_use(device: torch.device) -> str:
    """What the run holds now: allocated bytes of a GPU, or else the process's resident memory."""
    if device.type == "cuda":
        return f"{torch.cuda.memory_allocated(device) / 2**30:.2f} GiB"
    return f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB"
