"""`plan`: a row for every recipe, precision and switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mep_lightning import defaults
from mep_lightning.advice import refuse_ranks
from mep_lightning.bases import BaseFolder
from mep_lightning.bases.families import describe
from mep_lightning.bases.load import OFFLOADS, PRECISIONS, QUANTIZED, activation_dtype, goes_with
from mep_lightning.bases.skeleton import architecture
from mep_lightning.bases.weights import vae_dtype
from mep_lightning.distributed import ALONE, DDP, NAME, STRATEGIES, Ranks
from mep_lightning.errors import UserError
from mep_lightning.module import PersonalizationModule
from mep_lightning.plan.rehearsal import Peak, Phases, rehearse_offloads

Recipe = Callable[[str, bool | None], PersonalizationModule]
"""(precision, checkpointing) -> a fresh module; None leaves the latter to the recipe."""
GENERATING = ("load", "denoise", "decode")


@dataclass(frozen=True)
class Row:
    """What one way to train would take.

    Attributes:
        method: the recipe's name.
        base: as the user gave it.
        precision: of the frozen base.
        resolution: of the photos, px a side.
        offload: where the weights wait: "none" keeps them on the device.
        checkpointing: whether activations are recomputed in the backward pass.
        phases: the peak of every phase, of the process that takes most.
        devices: how many processes share the run, each on a device of its own.
        strategy: how they do, as the Trainer names it; None of one alone.
    """

    method: str
    base: str
    precision: str
    resolution: int
    offload: str
    checkpointing: bool
    phases: Mapping[str, Peak]
    devices: int = 1
    strategy: str | None = None

    @property
    def switches(self) -> list[str]:
        """What is switched on to save memory."""
        return ["checkpointing"] * self.checkpointing + ["streamed"] * (self.offload == "stream")

    @property
    def settings(self) -> list[str]:
        """The words of a command line that ask for it, beside the method's."""
        words = ["--model.precision", self.precision]
        words += ["--model.checkpointing", "true"] if self.checkpointing else []
        return words + (["--model.offload", self.offload] if self.offload != "none" else [])

    @property
    def launch(self) -> list[str]:
        """The words that ask for its processes."""
        if self.strategy is None:
            return []
        return ["--trainer.devices", str(self.devices), "--trainer.strategy", self.strategy]

    def __str__(self) -> str:
        return " ".join([f"{self.method} in {self.precision}", *(f"({switch})" for switch in self.switches)])

    @property
    def peak_bytes(self) -> int:
        """Of a whole run's tensors: loading, encoding, training, and drawing samples."""
        return max(peak.total for peak in self.phases.values())

    @property
    def needed_bytes(self) -> int:
        """As `peak_bytes`, with what a GPU's libraries hold beside tensors."""
        return max(peak.needed for peak in self.phases.values())

    @property
    def workspaces_bytes(self) -> int:
        """What they add to it."""
        return self.needed_bytes - self.peak_bytes

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def inference_peak_bytes(self) -> int:
        """Of drawing pictures alone: no optimizer, no other process."""
        drawing = (self.phases[name] for name in GENERATING)
        return max(peak.total - peak.optimizer - peak.buckets for peak in drawing)

    def as_dict(self, fits: bool | None) -> dict[str, Any]:
        """As `mep plan --json` prints it; `fits` is None without a budget."""
        return {
            "method": self.method,
            "base": self.base,
            "precision": self.precision,
            "resolution": self.resolution,
            "offload": self.offload,
            "checkpointing": self.checkpointing,
            "devices": self.devices,
            "strategy": self.strategy,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "workspaces_bytes": self.workspaces_bytes,
            "inference_peak_bytes": self.inference_peak_bytes,
            "breakdown": {name: asdict(peak) for name, peak in self.phases.items()},
            "fits": fits,
        }


def plan(
    recipes: Mapping[str, Recipe],
    base: str | Path,
    *,
    resolution: int | None = None,
    batch_size: int = 1,
    pictures: int | None = None,
    subjects: int = 1,
    device: str = "cuda",
    precisions: Sequence[str] = PRECISIONS,
    activations: str = "auto",
    devices: int = 1,
    strategy: str | None = None,
    asked: Callable[[str, bool], bool] = lambda offload, checkpointing: True,
    left_out: Callable[[str, str], None] = lambda name, why: None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rehearse every recipe in every precision: with and without checkpointing where there is a backward pass, and
    resident and, on a GPU, streamed where there is none or weights are quantised and checkpointed.

    Args:
        recipes: name -> maker of fresh modules.
        base: `sd15`, `sd21`, `sdxl`, or what `load_base` takes; only its JSON files are read.
        resolution: of the photos, px a side; the base's own by default, as pictures are drawn in any case.
        batch_size: samples a step.
        pictures: how many samples are denoised at once; by default what is usual for the base.
        subjects: that train in one batch, as in a `SubjectBatch`.
        device: "cuda" or "cpu", where the run would be; neither is needed here.
        precisions: which.
        activations: what quantised weights compute in, as for `load_base`; precisions that compute in another dtype are
            left out.
        devices: how many processes share a run, each on a device of its own: the peaks are one process's.
        strategy: how they do, "zo_ddp", "zo_ddp_data" or "ddp"; by default what suits each method (`strategy_of`).
        asked: offload and checkpointing -> whether there is to be a row.
        left_out: told each method that cannot be shared so, and why.
        progress: told each precision before its turn.

    Raises:
        UserError: nothing describes the base, or it cannot be rehearsed, or a recipe's subjects cannot be batched.
    """
    folder = architecture(base)
    info = describe(folder, base)
    where = torch.device(device)
    if activations != "auto":
        precisions = [name for name in precisions if name in goes_with(activations)]
        if not precisions:
            activation_dtype("fp32", where, info.family, activations)  # says what is wrong
    pictures = pictures or defaults.lookup(next(iter(recipes)), info.family, precisions[0])["sampling_batch"]
    rows: list[Row] = []
    known: dict[object, list[dict[str, Phases]]] = {}
    for precision in precisions:
        dtype = activation_dtype(precision, where, info.family, activations)
        found = BaseFolder(name=str(base), folder=folder, info=info, precision=precision, dtype=dtype, device=where)
        side = resolution or found.resolution
        ways = list(_ways(recipes, found, asked, devices, strategy, left_out))
        widths = (dtype.itemsize, vae_dtype(folder, dtype).itemsize)  # bf16 mostly takes what fp16 takes
        kind = (precision if precision in QUANTIZED else "", *widths)
        if ways and kind not in known:
            progress(precision)
            modules = (way.module for way in ways)
            sizes = {"batch_size": batch_size, "pictures": pictures, "subjects": subjects}
            known[kind] = rehearse_offloads(modules, found, side, **sizes)
        rows += [
            Row(
                way.name, str(base), precision, side, offload, way.checkpointing, phases[offload], devices, way.strategy
            )
            for offload in OFFLOADS
            for way, phases in zip(ways, known.get(kind, []), strict=True)
            if offload in way.offloads
        ]
    return rows


@dataclass(frozen=True)
class _Way:
    """What is rehearsed once: a recipe with or without checkpointing, for a row an offload."""

    name: str
    checkpointing: bool
    module: PersonalizationModule
    offloads: Sequence[str]
    strategy: str | None


def _ways(
    recipes: Mapping[str, Recipe],
    found: BaseFolder,
    asked: Callable[[str, bool], bool],
    devices: int,
    strategy: str | None,
    left_out: Callable[[str, str], None],
) -> Iterator[_Way]:
    for name, make in recipes.items():
        module = make(found.precision, None)
        if found.precision not in module.adapter.precisions:
            continue
        module.fill_in_defaults(found.family)
        how = None if devices == 1 else strategy or strategy_of(module)
        ranks = ALONE if how is None else Ranks(world=devices, shared=STRATEGIES[how])
        try:
            refuse_ranks(module, ranks)
        except UserError as why:
            left_out(name, str(why))
            continue
        modules = [module]
        if not (module.forward_only or module.checkpointing):
            modules.append(make(found.precision, True))
        for one in modules:
            one.ranks = ranks
            possible = OFFLOADS if found.device.type == "cuda" and _streams(one) else OFFLOADS[:1]
            if offloads := [offload for offload in possible if asked(offload, one.checkpointing)]:
                yield _Way(name, one.checkpointing, one, offloads, how)


def strategy_of(module: PersonalizationModule) -> str:
    """How several processes best share a module's run: members, where a step has some (docs/scaling.md)."""
    return NAME if any(one.forward_only for one in module.estimators) else DDP


def _streams(module: PersonalizationModule) -> bool:
    """Whether a module's weights may be streamed to a GPU (`advice.refuse_streaming_backwards`)."""
    if "stream" not in module.adapter.offloads or module.hollow is not None:
        return False
    return module.forward_only or (module.checkpointing and module.precision in QUANTIZED)
