"""How much memory a run takes, phase by phase, and what for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mep_lightning import phases
from mep_lightning.callbacks.meter import MemoryMeter, tensor_bytes
from mep_lightning.errors import refuse_unless
from mep_lightning.reading import read_json
from mep_lightning.run_folder import RunFolder, replacing, write_atomically

NOTED_STEPS = 3


class MemoryProfiler(Callback):
    """Measure the peak memory of every phase of `fit`; write `memory.json` and `memory.png` into the run's folder.

    Works with any LightningModule: `step` runs from the first batch to the last, other phases are those that code marks
    with `mep_lightning.phases.phase` (load, encode, precompute, sample, save). An outer phase's peak includes the
    phases inside it; sampling and saving between two batches are not charged to `step`.

    memory.json::

        {"device": "cpu" | "NVIDIA …",
         "phases": {phase: {"peak_bytes", "allocated_peak", "reserved_peak", "process_peak",
                            "breakdown": {"weights", "gradients", "optimizer", "activations", "other"}}},
         "peak_bytes", "peak_phase", "process_peak", "baseline_bytes",
         "subjects": where several runs (`runs`) shared the training that `step` was measured in, how many}

    - `allocated_peak` (and `peak_bytes`, the same number): on CUDA the allocator's exact peak. On a CPU the process's
      peak memory minus `baseline_bytes`, what the interpreter and its libraries held when `fit` began; this counts
      freed memory that the C allocator keeps, so it is an upper bound.
    - `reserved_peak`: with CUDA's caching allocator's slack; on a CPU equal to `allocated_peak`.
    - `process_peak`: what `nvidia-smi` would show, context included (on a GPU shared with others, theirs too); on a CPU
      the resident set. The outermost one covers the time between phases too.
    - `breakdown` adds up to `peak_bytes`. Weights, gradients and optimizer state are exact bytes of the tensors there;
      the rest is `activations` in encode, step and sample (temporary buffers included), `other` elsewhere.
    - `peak_phase`: the innermost phase at the highest peak.

    A resumed run keeps of every phase the process that took most.

    Nothing happens per step but an attribute test. On a CPU the peaks are the kernel's own high-water mark on Linux;
    elsewhere a thread reads the process's memory, and a peak between two readings is missed.

    Args:
        interval: seconds between two readings of that thread, above 0.

    Attributes:
        runs: whose folders the figures go to, where several share one training; else the Trainer's own.
    """

    def __init__(self, interval: float = 0.01) -> None:
        refuse_unless(interval > 0, "memory.interval", interval, "seconds above 0, such as 0.01")
        self.interval = interval
        self.runs: Sequence[RunFolder] = ()
        self._meter: MemoryMeter | None = None
        self._trainer: Trainer | None = None
        self._step_open = False
        self._explicit_steps = 0
        self._noted = 0
        self._resumes = False

    # -- what phases.observers are told ------------------------------------------------------------------------------

    def enter(self, name: str) -> None:
        """A phase begins. Between two batches it ends the step phase; the next batch reopens it."""
        if self._meter is None:
            return
        if name == "step" and self._step_open:
            self._explicit_steps += 1
            return
        if not self._in_batch():
            self._close_step()
        self._meter.enter(name)

    def exit(self, name: str) -> None:
        """A phase ends."""
        if self._meter is None:
            return
        if name == "step" and self._explicit_steps:
            self._explicit_steps -= 1
            return
        self._meter.exit(name)

    # -- what Lightning calls ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start measuring, before the module's own setup loads anything."""
        if stage != "fit":
            return
        self._finish(None)
        device = trainer.strategy.root_device
        self._meter = MemoryMeter(device, lambda: tensor_bytes(pl_module, trainer.optimizers, device), self.interval)
        self._meter.start()
        self._trainer, self._step_open, self._explicit_steps = trainer, False, 0
        self._resumes = False
        phases.observers.append(self)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The run goes on, and with it its figures."""
        self._resumes = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the step phase unless it is open."""
        if not self._step_open and self._meter is not None:
            self._meter.enter("step")
            self._step_open, self._noted = True, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The moment when gradients are there: count, in the first few steps after the phase was opened."""
        if self._noted < NOTED_STEPS and self._meter is not None:
            self._meter.note()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer's state is there after its first step."""
        if self._noted < NOTED_STEPS and self._meter is not None:
            self._noted += 1
            self._meter.note()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training."""
        self._close_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last batch is done."""
        self._close_step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the figures, once every callback has saved what it saves."""
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that ran out of memory is the one whose figures are wanted most."""
        self._finish(trainer)

    # ------------------------------------------------------------------------------------------------------------------

    def _in_batch(self) -> bool:
        """Whether a training step runs; callbacks' hooks come in any order, Lightning's count does not."""
        assert self._trainer is not None
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return batches.started > batches.processed

    def _close_step(self) -> None:
        if self._step_open and self._meter is not None:
            self._meter.exit("step")
        self._step_open, self._explicit_steps = False, 0

    def _finish(self, trainer: Trainer | None) -> None:
        """Stop measuring; write the files where there is a trainer and something was measured."""
        if self._meter is None:
            return
        self._close_step()
        phases.observers.remove(self)
        self._meter.stop()
        memory, self._meter = self._meter.summary(), None
        if trainer is None or not (trainer.is_global_zero and memory["phases"]):
            return
        if self.runs:
            memory["subjects"] = len(self.runs)
        for run in self.runs or [RunFolder(Path(trainer.default_root_dir))]:
            if "step" in memory["phases"] or not run.memory_json.is_file():  # figures of a training outlast an attempt
                write(with_earlier(memory, run.memory_json) if self._resumes else memory, run)


def with_earlier(memory: dict[str, Any], path: Path) -> dict[str, Any]:
    """A resumed run's figures: of each phase those of the process, this or an earlier one on such a device, that took
    more."""
    earlier = read_json(path)
    try:
        if earlier["device"] != memory["device"]:
            return memory
        theirs, ours = dict(earlier["phases"]), memory["phases"]
        more = {name for name in ours if name not in theirs or ours[name]["peak_bytes"] > theirs[name]["peak_bytes"]}
        highest = earlier if earlier["peak_bytes"] > memory["peak_bytes"] else memory
        whole = {key: highest[key] for key in ("peak_bytes", "peak_phase", "baseline_bytes")}
        whole["process_peak"] = max(earlier["process_peak"], memory["process_peak"])
    except (KeyError, TypeError):  # damaged, or there is none
        return memory
    merged = memory | whole | {"phases": theirs | {name: ours[name] for name in more}}
    stepped = memory if "step" in more else earlier
    merged.pop("subjects", None)
    return merged | ({"subjects": stepped["subjects"]} if "subjects" in stepped else {})


def write(memory: dict[str, Any], run: RunFolder) -> None:
    """Write `memory.json` and its picture `memory.png`."""
    from mep_lightning.evaluation.plots import memory_figure

    write_atomically(run.memory_json, json.dumps(memory, indent=2) + "\n")
    with replacing(run.memory_png) as temporary:
        memory_figure(memory).savefig(temporary, format="png", dpi=144)
