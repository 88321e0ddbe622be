"""What keeps a run's work: the last checkpoint, a log that a resumed run continues, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import csv
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from mep_lightning.errors import LONGEST, UserError
from mep_lightning.phases import phase
from mep_lightning.reading import LARGEST_LOG
from mep_lightning.run_folder import RunFolder, replacing, write_atomically

NEEDED = (
    *("global_step", "state_dict", "loops.fit_loop", "lr_schedulers", "pytorch-lightning_version"),
    *("optimizer_states.state", "optimizer_states.param_groups"),
)
"""What a checkpoint must hold for Lightning to go on; of lists the first element is looked at."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it and renames it, so that a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with phase("save"), replacing(path) as temporary:
            torch.save(checkpoint, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that training can go on from, as far as Lightning needs it; the module looks after its own part.

    Raises:
        UserError: it cannot be read, or lacks something; the message names the file and the key.
    """
    mend = "delete it to begin this run from its first step"
    if not path.is_file():
        raise UserError(f"{path} is no file; {mend}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {mend}.") from error
    for key in NEEDED:
        node = checkpoint
        for part in key.split("."):
            node = node[0] if isinstance(node, list) and node else node
            if not isinstance(node, dict) or part not in node:
                raise UserError(f"{path} lacks {key}: it is damaged, or of another program; {mend}.")
            node = node[part]
    for section in ("state_dict", "optimizer_states", "mep"):
        if infinite := _infinite(checkpoint.get(section), section):
            raise UserError(f"{path} holds {infinite} with values that are not finite: it is damaged; {mend}.")
    if odd := _no_count(checkpoint["loops"], "loops"):
        raise UserError(f"{path} has no count in {odd}: it is damaged; {mend}.")
    step = checkpoint["global_step"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{path} says that it is at step {str(step)[:LONGEST]!r}: it is damaged; {mend}.")
    return checkpoint


def _no_count(node: Any, name: str) -> str | None:
    """The name of what should be one of Lightning's counts and is none; None where all are."""
    for key, child in node.items() if isinstance(node, dict) else ():
        where = f"{name}.{key}"
        if key in ("total", "current"):
            counts = child.values() if isinstance(child, dict) else [None]
            odd = None if all(isinstance(one, int) and 0 <= one < 2**63 for one in counts) else where
        else:
            odd = _no_count(child, where)
        if odd:
            return odd
    return None


def _infinite(node: Any, name: str) -> str | None:
    """The name of a tensor in a part of a checkpoint that holds another value than numbers; None where none does."""
    if isinstance(node, torch.Tensor):
        return name if node.is_floating_point() and not node.isfinite().all() else None
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return next((found for key, child in children if (found := _infinite(child, f"{name}.{key}"))), None)


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, which `--resume` carries on from.

    Lightning's ModelCheckpoint would store its absolute folder in the checkpoint; a run's folder may be moved.

    Args:
        every: steps between saves; it is also saved when training ends or is stopped.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise UserError(f"checkpoint.every is {every}; give the number of steps between saves, 1 or more.")
        self.every = every
        self._saved_at = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save(trainer)  # the last step too: whatever happens while the last pictures are drawn, it is kept

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or trainer.global_step in (0, self._saved_at):  # type: ignore[attr-defined]
            return
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(RunFolder(Path(trainer.default_root_dir)).last_checkpoint)


class StopAfterStep(Callback):
    """Turns the first Ctrl-C (or SIGTERM) into "finish this step, save, stop"; a second Ctrl-C stops at once.

    Whoever starts a process may tell it twice: a system all of a group, and the parent its own.

    An exception in the middle of a step could leave a parameter updated and its step not counted, and a checkpoint of
    that would not resume to the same bits. What is made ahead of the first step ends at once: it is kept as it comes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Until the first step SIGTERM does what Ctrl-C does, where Lightning would only take note of it."""
        self._hear({signal.SIGTERM: self._end})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._trainer is None:
            self._trainer = trainer
            self._hear(dict.fromkeys(self.SIGNALS, self._stop))

    def _hear(self, handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                self._previous.setdefault(number, signal.signal(number, handler))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Of several processes all stop after the same step, whichever was told to."""
        ranks = getattr(pl_module, "ranks", None)
        if ranks is not None and ranks.world > 1 and (told := ranks.highest(self.received or 0)):
            self.received = told
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C may cut the last pictures short: all is saved. (After an error Lightning restores.)"""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self._trainer = {}, None

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        raise KeyboardInterrupt

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self._trainer is not None and self._trainer.world_size == 1:
            self._trainer.should_stop = True
        if number == signal.SIGINT:
            print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True)


class RunLog(Logger):
    """Logs to `log.csv` in the run's folder, a row at a time; a resumed run continues it from its own first step.

    Args:
        run: the run's folder.
    """

    name = version = None  # the run's folder says it all

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._columns: list[str] = []

    @property
    def save_dir(self) -> str:
        return str(self._run.root)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the same folder holds every setting."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row. Rows that the run wrote after its last checkpoint are dropped first: they are made again."""
        row = {"step": step, **metrics}
        if not row.keys() <= set(self._columns):
            rows = _read_log(self._run.log)
            if not self._columns:
                rows = [old for old in rows if int(old["step"]) < (step or 0)]
            self._columns = sorted({*row, *(name for old in rows for name in old)})
            header = {name: name for name in self._columns}
            write_atomically(self._run.log, _csv(self._columns, [header, *rows]))
        with open(self._run.log, "a", encoding="utf-8", newline="") as file:
            file.write(_csv(self._columns, [row]))


def _csv(columns: list[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The rows that are whole; none where there is no log yet."""
    if not path.exists():
        return []
    if not path.is_file() or path.stat().st_size > LARGEST_LOG:
        raise UserError(f"{path} is no log of a run: remove it.")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return [row for row in csv.DictReader(file) if None not in row and (row.get("step") or "").isdecimal()]
