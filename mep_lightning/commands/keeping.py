"""What keeps a run's work: the last checkpoint, a log that a resumed run continues, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import csv
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mep_lightning.errors import UserError
from mep_lightning.phases import phase
from mep_lightning.run_folder import RunFolder, replacing, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it and renames it, so that a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with phase("save"), replacing(path) as temporary:
            torch.save(checkpoint, temporary)


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
    """Turns the first Ctrl-C (or SIGTERM) into "finish this step, save, stop"; the second one stops at once.

    An exception in the middle of a step could leave a parameter updated and its step not counted, and a checkpoint of
    that would not resume to the same bits.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._trainer: Trainer | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._trainer = trainer
        self._previous = {number: signal.signal(number, self._stop) for number in self.SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C may cut the last pictures short: all is saved. (After an error Lightning restores.)"""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if self._trainer is not None:
            self._trainer.should_stop = True
        if number == signal.SIGINT:
            print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True)


class RunLog(CSVLogger):
    """Logs to `log.csv` in the run's folder; a resumed run continues it from its own first step.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(save_dir=run.root, name="", version="", flush_logs_every_n_steps=50)
        self._run = run

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: config.yaml in the same folder holds every setting."""

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ContinuedLog(self._run)
        return self._experiment


class _ContinuedLog(_ExperimentWriter):
    """Lightning's writer, without its habit of deleting the file of the run that is being resumed."""

    def __init__(self, run: RunFolder) -> None:
        self.NAME_METRICS_FILE = run.log.name
        self._earlier: list[dict[str, str]] = []
        super().__init__(log_dir=str(run.root))
        if run.log.is_file():
            with open(run.log, newline="") as file:
                reader = csv.DictReader(file)
                self._earlier = list(reader)
                self.metrics_keys = list(reader.fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        """Accepts a folder that holds files: the run's folder always does."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        if self._earlier and step is not None:
            self._drop_from(step)

    def _drop_from(self, step: int) -> None:
        """Drops the rows that the run wrote after its last checkpoint, once: they are being made again."""
        kept = [row for row in self._earlier if row.get("step", "").isdecimal() and int(row["step"]) < step]
        if len(kept) < len(self._earlier):
            lines = [",".join(self.metrics_keys)]
            lines += [",".join(row.get(key) or "" for key in self.metrics_keys) for row in kept]
            write_atomically(self.metrics_file_path, "\n".join(lines) + "\n")
        self._earlier = []
