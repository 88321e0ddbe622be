"""Runs of `mep fit` that train in one batch; each has the folder, log, pictures and checkpoint that it has alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from mep_lightning.callbacks import PUTS, Export, MemoryProfiler, Samples
from mep_lightning.checkpoint import merge, split
from mep_lightning.commands.budget import refuse_too_large
from mep_lightning.commands.chatter import quiet_after_imports
from mep_lightning.commands.fit import requested
from mep_lightning.commands.keeping import AtomicCheckpointIO, LastCheckpoint, RunLog, StopAfterStep, read_checkpoint
from mep_lightning.commands.request import say
from mep_lightning.commands.settings import save_config
from mep_lightning.commands.training import FitCLI, alone, going_on, is_finished, step_of, stopped
from mep_lightning.errors import UserError, counted
from mep_lightning.evaluation import write_report
from mep_lightning.run_folder import RunFolder
from mep_lightning.subject_batch import SubjectBatch, SubjectBatchData, why_not_batched

OF_EACH = (PUTS, Samples, Export)
"""Callbacks that look after one subject each."""
OF_ALL = (StopAfterStep, MemoryProfiler, ProgressBar, LastCheckpoint)
"""Those that a batch has once."""


def why_alone(line: Sequence[str]) -> str | None:
    """Why the run of a command line cannot train beside others, such as "its adapter is LoRA"; None where it can.

    Wrong settings are no reason: whoever runs them is told.
    """
    quiet_after_imports()
    with TemporaryDirectory() as nowhere, suppress(UserError):
        request, options = requested([*line, "--run", f"{nowhere}/run"])  # whatever there is of its own already
        return "--budget chooses what it is" if options.budget else _obstacle(FitCLI(request))
    return None


def _obstacle(cli: FitCLI) -> str | None:
    """What keeps a run from training beside others."""
    if (why := why_not_batched(cli.model)) is not None:
        return why
    trainer = cli.trainer
    if others := [type(one).__name__ for one in _callbacks(trainer) if not isinstance(one, (*OF_EACH, *OF_ALL))]:
        return f"its callback {others[0]} looks after one run"
    if not all(isinstance(logger, RunLog) for logger in trainer.loggers):
        return "it has a logger of its own"
    if type(trainer.strategy.checkpoint_io) is not AtomicCheckpointIO:
        return "its checkpoints have a keeper of their own"
    if trainer.world_size > 1:
        return "it has several processes"
    if trainer.max_steps < 1 or cli.datamodule.repeats is not None:
        return "it ends with an epoch"
    return None


def train(lines: Sequence[Sequence[str]]) -> int:
    """Train the runs of several command lines in one batch, all from the same step, and return the exit status.

    Args:
        lines: the words of each `mep fit`; each names its run's folder, and trains a token as the others do.

    Raises:
        UserError: a run cannot train beside others, they are unlike, another trains in a folder, or what each of them
            would be told alone.
    """
    quiet_after_imports()
    asked = [requested(line) for line in lines]
    requests = [request for request, _ in asked]
    clis = [FitCLI(request) for request in requests]
    runs = [run for request in requests if (run := request.run) is not None]
    planned = not any(options.no_plan for _, options in asked)
    for cli, run in zip(clis, runs, strict=True):
        if (why := _obstacle(cli)) is not None:
            raise UserError(f"{run.root} cannot train beside others, as {why}: train it alone.")
        if cli.trainer.max_steps != clis[0].trainer.max_steps:
            raise UserError(f"{run.root} and {runs[0].root} differ in trainer.max_steps: give both the same.")
    with ExitStack() as folders:
        for request in requests:
            folders.enter_context(alone(request))
        return _train(clis, runs, planned)


def _train(clis: Sequence[FitCLI], runs: Sequence[RunFolder], planned: bool) -> int:
    for cli, run in zip(clis, runs, strict=True):
        if cli.request.resume:
            run.sweep()
    first, trainer = clis[0], clis[0].trainer
    at = step_of(runs[0].last_checkpoint) if first.request.resume else 0
    if trainer.max_steps <= at and all(map(is_finished, runs)):
        say(f"All {len(runs)} are at step {at}. Nothing is left to train.")
        return 0
    batch = SubjectBatch([cli.model for cli in clis])
    data = SubjectBatchData({str(number): cli.datamodule for number, cli in enumerate(clis)})
    data.setup("fit")  # a damaged photo is named before gigabytes are read
    say(
        f"{batch.method} on {batch.first.base_name} ({batch.first.precision}), {len(runs)} subjects in one batch, from "
        f"step {at} to {trainer.max_steps}. Everything goes to:",
        *(f"  {run.root}: {cli.datamodule.summary()}" for cli, run in zip(clis, runs, strict=True)),
    )
    resumed = first.request.resume
    if planned:
        samples, device = first._get(first.config_init, "samples"), trainer.strategy.root_device
        refuse_too_large(first.model, first.datamodule, samples, device, resumed=resumed, subjects=len(runs))
    _share(clis, runs)
    started = time.monotonic()
    try:
        with going_on(runs, trainer, at):
            for cli, run in zip(clis, runs, strict=True):
                cli.config.data.class_word = cli.datamodule.class_word
                save_config(cli.config, run)
            checkpoint = str(runs[0].last_checkpoint) if at else None
            trainer.fit(batch, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # Lightning's answer to a second Ctrl-C, or to one before the first step
        return max([stopped(run, trainer, first.stopper.received or signal.SIGINT, resumed) for run in runs])
    for run in runs:
        write_report(run)
    if (number := first.stopper.received) is not None:
        return max([stopped(run, trainer, number, resumed) for run in runs])
    steps = counted(trainer.global_step - at, "step")
    say(f"Learned {len(runs)} subjects in {steps} ({time.monotonic() - started:.0f} s).")
    return 0


def _share(clis: Sequence[FitCLI], runs: Sequence[RunFolder]) -> None:
    """Make the first run's Trainer that of all of them."""
    trainer = clis[0].trainer
    kept = [one for one in _callbacks(trainer) if not isinstance(one, OF_EACH)]
    for one in kept:
        if isinstance(one, MemoryProfiler):
            one.runs = runs
    seats = [
        (OwnTrainer(trainer, cli, run), cli.model, [one for one in _callbacks(cli.trainer) if isinstance(one, OF_EACH)])
        for cli, run in zip(clis, runs, strict=True)
    ]
    trainer.callbacks = [kept[0], CallbacksPerSubject(seats), *kept[1:]]  # type: ignore[attr-defined]
    trainer.loggers = [SubjectLogs([RunLog(run) for run in runs])] if trainer.loggers else []
    trainer.strategy.checkpoint_io = SubjectCheckpointIO(runs)


def _callbacks(trainer: Any) -> list[Callback]:
    return trainer.callbacks


class OwnTrainer:
    """The Trainer of a batch as a callback of one of its runs sees it: with its own subject, photos and folder."""

    def __init__(self, trainer: Trainer, cli: FitCLI, run: RunFolder) -> None:
        self._trainer = trainer
        self.lightning_module, self.datamodule = cli.model, cli.datamodule
        self.default_root_dir = str(run.root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class CallbacksPerSubject(Callback):
    """Lets callbacks of every run look after its own subject."""

    def __init__(self, seats: Sequence[tuple[Any, LightningModule, Sequence[Callback]]]) -> None:
        self.seats = seats

    def _tell(self, hook: str, *arguments: Any) -> None:
        for trainer, module, callbacks in self.seats:
            for callback in callbacks:
                getattr(callback, hook)(trainer, module, *arguments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._tell("setup", stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_fit_start")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_train_start")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *what: Any) -> None:
        self._tell("on_train_batch_end", *what)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_fit_end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._tell("on_exception", exception)


class SubjectLogs(Logger):
    """Logs what is said of each subject to its own run's log, by the names that it has alone.

    Args:
        logs: the runs', in the subjects' order.
    """

    name = version = None

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self.logs = logs

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in each run's folder holds every setting."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """A row in each log: "train/loss/1" is the second's "train/loss"."""
        shared = {name: value for name, value in metrics.items() if "/" not in name}
        for number, log in enumerate(self.logs):
            own = {name: value for name, value in metrics.items() if name.endswith(f"/{number}")}
            log.log_metrics(shared | {name.removesuffix(f"/{number}"): value for name, value in own.items()}, step)


class SubjectCheckpointIO(AtomicCheckpointIO):
    """Keeps each subject's part of a checkpoint in its own run's folder, from where it goes on alone or beside others.

    Args:
        runs: in the subjects' order; whatever path is asked for, their last checkpoints are meant.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs = runs

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        for run, own in zip(self.runs, split(checkpoint), strict=True):
            super().save_checkpoint(own, run.last_checkpoint, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return merge([read_checkpoint(run.last_checkpoint) for run in self.runs])
