"""The training behind `mep fit`: a LightningCLI over the module and the data, with every `auto` filled in."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning import adapters as _adapters  # noqa: F401  (imported so that parts are found by their short names)
from mep_lightning import timesteps as _timesteps  # noqa: F401
from mep_lightning.bases import identify
from mep_lightning.callbacks import PUTS, Export, MemoryProfiler, Samples  # noqa: F401
from mep_lightning.commands.budget import choose, refuse_too_large
from mep_lightning.commands.chatter import debugging, quiet_after_imports
from mep_lightning.commands.keeping import (
    AtomicCheckpointIO,
    LastCheckpoint,
    RunLog,
    StopAfterStep,
    read_checkpoint,
)
from mep_lightning.commands.mistakes import Sources, missing_package, sentence
from mep_lightning.commands.progress import StepProgress
from mep_lightning.commands.request import RUNS, FitRequest, is_first_process, is_one_of_many, refuse_taken, say
from mep_lightning.commands.settings import (
    count_epochs_in_steps,
    fill_in_auto,
    make_absolute,
    refuse_changes,
    refuse_endless_decay,
    refuse_impossible,
    refuse_nulls,
    save_config,
    tell_settings,
)
from mep_lightning.distributed import LostRankError, Ranks
from mep_lightning.errors import CheckpointError, UserError, counted, is_out_of_memory, reason
from mep_lightning.evaluation import write_report
from mep_lightning.hollow import PROGRESS
from mep_lightning.plan import Budget
from mep_lightning.run_folder import RunFolder, held, write_atomically
from mep_lightning.templates import IN_THE_STYLE_OF

RUN_VARIABLE = "MEP_RUN"


class RunTrainer(Trainer):
    """Lightning's Trainer, whose number of steps may be the method's own.

    Args:
        max_steps: steps to train; "auto" is the method's own number for this base.
    """

    def __init__(self, *args: Any, max_steps: int | Literal["auto"] = "auto", **kwargs: Any) -> None:
        if not isinstance(max_steps, int):
            raise UserError("trainer.max_steps is auto, which only `mep fit` fills in; give a number.")
        super().__init__(*args, max_steps=max_steps, **kwargs)


class FitCLI(LightningCLI):
    """Parses recipes and settings, and builds the module, the data and the Trainer.

    `checkpoint`, `samples`, `memory` and `export` are callbacks of every run with keys of their own, so that neither
    `--trainer.callbacks+=` nor a list of callbacks in a recipe can lose them.
    """

    def __init__(self, request: FitRequest, **kwargs: Any) -> None:
        self.request = request
        super().__init__(
            PersonalizationModule,
            SubjectData,
            trainer_class=RunTrainer,
            trainer_defaults={
                "accelerator": "auto",
                "devices": 1,
                "max_epochs": -1,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": "mep fit", "exit_on_error": False, "allow_abbrev": False},
            args=request.arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(MemoryProfiler, "memory")
        parser.add_lightning_class_args(Export, "export")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if self.request.resume:  # alone and first, so that its mistakes are told as its own
            kept = self.request.recipes[:1]
            self.before = _parsed(parser, ["--config", str(kept[0][0])], Sources(kept, []))
        sources = Sources(self.request.recipes, self.request.settings)
        self.config = _parsed(parser, args, sources)
        refuse_impossible(self.config, sources.where)
        refuse_nulls(self.config, sources.where)

    def before_instantiate_classes(self) -> None:
        fill_in_auto(self.config)
        refuse_endless_decay(self.config)
        if self.config.data.path is None and identify(self.config.model.base).family != "tiny":
            raise UserError("data.path is missing; give it a folder of photos (only the base tiny brings its own).")
        make_absolute(self.config)
        self.request.run = self.request.run or self._new_run()
        if self.request.resume:
            fill_in_auto(self.before)
            make_absolute(self.before)
            refuse_changes(self.before, self.config, self.request.run)
        self.config.trainer.default_root_dir = str(self.request.run.root)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a constructor says about its arguments
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (UserError, ModuleNotFoundError)):
                cause = cause.__cause__ or cause.__context__
            told = cause if isinstance(cause, UserError) else missing_package(error, cause)
            if told is None:
                raise
            raise told from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.request.run is not None
        settings = self._get(self.config_init, "trainer")
        logger, plugins = settings["logger"], settings["plugins"]
        if logger is not False:  # the report reads our log, whatever else the user logs to
            others = logger if isinstance(logger, list) else [logger]
            kwargs["logger"] = [RunLog(self.request.run), *(other for other in others if isinstance(other, Logger))]
        plugins = plugins if isinstance(plugins, list) else [plugins] if plugins is not None else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            text = " ".join(str(error).split()).rstrip(".!")
            devices = (
                " `mep doctor` lists the devices there are." if re.search("accelerator|device", text, re.I) else ""
            )
            raise UserError(f"wrong trainer setting: {text}.{devices}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        self.stopper = StopAfterStep()
        named = config["callbacks"] or []
        named = named if isinstance(named, list) else [named]
        has_bar = config.get("enable_progress_bar") is False or any(isinstance(one, ProgressBar) for one in named)
        config["callbacks"] = [self.stopper, *named]  # first, so that it lets go before the last pictures are drawn
        return super()._instantiate_trainer(config, [*callbacks, *([] if has_bar else [StepProgress()])])

    def _new_run(self) -> RunFolder:
        """The default folder; other processes of the same run take the first one's name."""
        if not is_first_process() and RUN_VARIABLE in os.environ:
            return RunFolder(Path(os.environ[RUN_VARIABLE]))
        if is_one_of_many():
            raise UserError("a launcher started several processes, each of which would make a folder: give --run DIR.")
        return RunFolder.new(RUNS, self.config.model.method or "run")


def _parsed(parser: LightningArgumentParser, args: Any, sources: Sources) -> Namespace:
    """Settings, or one sentence about the mistake in them."""
    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        if debugging():
            raise
        raise UserError(sentence(error.message, parser, sources)) from error


def train(request: FitRequest, budget: str | None = None, planned: bool = True) -> int:
    """Trains as requested and returns the exit status.

    Args:
        request: what to train.
        budget: memory that the plan may spend; it then chooses what the request leaves open.
        planned: whether a run that would not fit into free memory is refused.

    Raises:
        UserError: wrong input, or another trains in the folder; one made for the run is gone again unless a step was
            saved.
    """
    quiet_after_imports()
    if not request.says("model.base") and not request.says("print_config"):
        say("No --model.base given: taking the embedded base, tiny.")
    limit = None
    if budget is not None:
        request, limit = choose(request, budget)
    is_named = request.run is not None
    try:
        cli = FitCLI(request)
    except BaseException:
        if request.run is not None and not is_named and is_first_process():
            with suppress(OSError):
                request.run.root.rmdir()  # nothing is in it yet
        raise
    with alone(request) as run:
        try:
            return _fit(cli, planned, limit)
        except BaseException as error:
            begun = request.resume or cli.trainer.global_step > 0 or isinstance(error, LostRankError)
            if not begun and is_first_process():
                _discard(run)
            raise


@contextmanager
def alone(request: FitRequest) -> Iterator[RunFolder]:
    """The folder of a run, in which no other trains meanwhile: each would take the other's files for its own.

    Of several processes of one run the first sees to it.

    Raises:
        UserError: another trains there, or has begun a run there since the command line was read.
    """
    run = request.run
    assert run is not None
    if not is_first_process():
        yield run
        return
    with held(run.root, f"another `mep fit` trains in {run.root}: wait until it is done, or give another --run."):
        if not request.resume and run.config.is_file():
            refuse_taken(run)
        yield run


def _fit(cli: FitCLI, planned: bool, budget: Budget | None) -> int:
    run, trainer, model, data = cli.request.run, cli.trainer, cli.model, cli.datamodule
    assert run is not None
    os.environ[RUN_VARIABLE] = str(run.root)
    if cli.request.resume and is_first_process():
        run.sweep()
    first_step = step_of(run.last_checkpoint) if cli.request.resume else 0
    ends = count_epochs_in_steps(trainer, data)
    ended = first_step == trainer.max_steps > 0 and not is_finished(run)  # killed between its last step and its report
    if 0 < trainer.max_steps <= first_step and not ended:
        say(
            f"{run.root} is at step {first_step}. Nothing is left to train; add --{ends} with a larger number to go on."
        )
        return 0
    data.setup("fit")  # a damaged photo is named before gigabytes are read
    cli.config.data.class_word = data.class_word
    say(
        f"{model.method} on {model.base_name} ({model.precision}) with {data.summary()}.",
        f"{_span(first_step, trainer.max_steps)} Everything goes to {run.root}.",
    )
    if planned:
        samples: Samples = cli._get(cli.config_init, "samples")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        refuse_too_large(
            model,
            data,
            samples,
            trainer.strategy.root_device,
            budget,
            callbacks,
            resumed=cli.request.resume,
            ranks=Ranks.of(trainer),
            processes=trainer.num_devices,
        )
    started = time.monotonic()
    try:
        with going_on([run], trainer, first_step):
            if is_first_process():
                save_config(cli.config, run)
                tell_settings(trainer, cli.config)
            checkpoint = str(run.last_checkpoint) if first_step else None
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except LostRankError as error:
        again = f"carry on, with as many processes as there are: mep fit --run {shlex.quote(str(run.root))} --resume"
        raise LostRankError(f"{error}; {again}") from error
    except SystemExit:  # Lightning's answer to a second Ctrl-C, or to one before the first step
        return stopped(run, trainer, cli.stopper.received or signal.SIGINT, cli.request.resume)
    if cli.stopper.received is not None:
        _report(run)
        return stopped(run, trainer, cli.stopper.received, cli.request.resume)
    _report(run)
    if model.skipped.total:
        say(f"Skipped: {counted(model.skipped.total, 'step')}, where the loss or its gradient was not finite.")
    say(*_summary(run, trainer.global_step - first_step, time.monotonic() - started))
    phrase = model.adapter.phrase(model.class_word)
    prompt = f"a cat {IN_THE_STYLE_OF} {phrase}" if model.adapter.is_style else f"a photo of a {phrase}"
    say(f"Next: {shlex.join(['mep', 'predict', '--run', str(run.root), '--prompts', prompt])}")
    return 0


@contextmanager
def going_on(runs: Sequence[RunFolder], trainer: Trainer, at: int) -> Iterator[None]:
    """Around the settings' writing and the training of runs: what is refused before it trains leaves settings alone.

    Args:
        runs: that train.
        trainer: theirs.
        at: the step that they go on from.

    Raises:
        UserError: a checkpoint is damaged, or another run's.
    """
    before = {run: run.config.read_text() for run in runs if run.config.is_file()}
    checkpoints = " or ".join(str(run.last_checkpoint) for run in runs)
    try:
        yield
    except LostRankError:
        raise
    except Exception as error:
        lacks_room = isinstance(error, OSError) or is_out_of_memory(error)
        damaged = bool(before) and _is_restoring(trainer) and not isinstance(error, UserError) and not lacks_room
        refused = damaged or isinstance(error, CheckpointError)
        if is_first_process() and (refused or (isinstance(error, UserError) and trainer.global_step <= at)):
            for run, settings in before.items():
                write_atomically(run.config, settings)
        if isinstance(error, CheckpointError):
            raise UserError(f"{checkpoints}: {error}") from error
        if damaged:
            mend = "go on with each alone" if len(runs) > 1 else "delete it to begin this run from its first step"
            raise UserError(
                f"{checkpoints} cannot be gone on from ({reason(error)}): it is damaged; {mend}."
            ) from error
        raise


def _is_restoring(trainer: Trainer) -> bool:
    """Whether Lightning is about handing out what a checkpoint holds."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def show_all_options(arguments: list[str]) -> int:
    """Prints jsonargparse's own help: every setting there is, or those of one class."""
    quiet_after_imports()
    FitCLI(FitRequest([], arguments))
    return 0


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at; 0 when the run was stopped before its first."""
    if not checkpoint.is_file():
        return 0
    return int(read_checkpoint(checkpoint)["global_step"])


def is_finished(run: RunFolder) -> bool:
    """Whether a run has written all that comes after its last checkpoint; the report is the last of it."""
    if not (run.report.is_file() and run.adapter.is_dir()):
        return False
    return run.report.stat().st_mtime_ns >= run.last_checkpoint.stat().st_mtime_ns


def _span(first_step: int, max_steps: int) -> str:
    if 0 < max_steps == first_step:
        return f"Resuming at step {first_step}, the last: what comes after the training is still to be made."
    start = f"Resuming at step {first_step}" if first_step else "Training"
    return (
        f"{start} for {counted(max_steps - first_step, 'step')}."
        if max_steps > 0
        else f"{start}, without end: stop with Ctrl-C."
    )


def _report(run: RunFolder) -> None:
    if is_first_process():
        write_report(run)


def stopped(run: RunFolder, trainer: Trainer, number: int, resumed: bool) -> int:
    """Says how to carry on, and returns the shell's status for the signal.

    Args:
        run: that was stopped.
        trainer: its own.
        number: the signal.
        resumed: whether an earlier command had begun it, which it is then left to.
    """
    again = f"mep fit --run {shlex.quote(str(run.root))} --resume"
    if run.last_checkpoint.is_file():
        total = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        line = f"stopped; all is saved up to step {step_of(run.last_checkpoint)}{total}. Carry on with: {again}"
    elif trainer.global_step > 0:
        line = f"stopped at step {trainer.global_step}, before the first checkpoint. Begin again with: {again}"
    elif (run.activations / PROGRESS).is_file() or (run.prior.is_dir() and any(run.prior.iterdir())):
        line = f"stopped before the first step; what was made ahead of it is kept. Carry on with: {again}"
    elif resumed:
        line = f"stopped before the first step; what there was is kept. Begin again with: {again}"
    else:
        if is_first_process():
            _discard(run)
        line = "stopped before the first step; nothing is kept."
    if is_first_process():
        print(f"mep fit: {line}", file=sys.stderr, flush=True)
    return 128 + number


def _discard(run: RunFolder) -> None:
    """Removes what a run without a checkpoint left behind, so that its name is free for the next try.

    Only whoever holds the folder may; with the hold an empty folder goes, too.
    """
    if run.last_checkpoint.exists() or not run.root.is_dir():
        return
    for path in (run.config, run.log, run.memory_json, run.memory_png, run.report):
        path.unlink(missing_ok=True)
    for folder in (run.samples, run.adapter, run.checkpoints, run.activations, run.prior):
        shutil.rmtree(folder, ignore_errors=True)


FOR = {
    "learned_embeds.safetensors": "for diffusers, ComfyUI and A1111",
    "lora_kohya.safetensors": "for ComfyUI and A1111",
}
"""Exported file -> who reads it."""


def _summary(run: RunFolder, steps: int, seconds: float) -> list[str]:
    """What was made and where, and what to do next."""
    minutes, rest = divmod(round(seconds), 60)
    lines = [f"Learned in {counted(steps, 'step')} ({minutes} min {rest} s). In {run.root}:"]
    made = [
        (run.samples / "before_after.png", "photos, and the subject before and after"),
        *((path, FOR.get(path.name, "for diffusers")) for path in sorted(run.adapter.rglob("*.safetensors"))),
        (run.memory_png, "peak memory of every phase"),
        (run.report, "all of it on one page"),
    ]
    return lines + [f"  {path.relative_to(run.root)!s:<40} {what}" for path, what in made if path.exists()]
