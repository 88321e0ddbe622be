"""The plan behind `mep fit`: what a budget lets a run be, and whether what it will be fits into what is free."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mep_lightning import PersonalizationModule, SubjectData, defaults
from mep_lightning import adapters as _adapters  # noqa: F401  (imported so that parts are found by their short names)
from mep_lightning import timesteps as _timesteps  # noqa: F401
from mep_lightning.bases import identify
from mep_lightning.bases.load import PRECISIONS
from mep_lightning.callbacks import HollowedActivations, PriorPreservation, Samples
from mep_lightning.commands.recipes import find_recipe, read_recipe
from mep_lightning.commands.request import FitRequest, say
from mep_lightning.defaults import METHODS
from mep_lightning.distributed import ALONE, DDP, STRATEGIES, Ranks
from mep_lightning.errors import TooLargeError, UserError, human
from mep_lightning.plan import Budget, Row, first_fit, free_bytes, parse_size, plan, rehearse
from mep_lightning.plan.budget import overhead
from mep_lightning.plan.rows import GENERATING
from mep_lightning.quantization import why_not_int4


def recipe(name: str) -> Callable[[str, bool | None], PersonalizationModule]:
    """A maker of modules, by precision and checkpointing, as a packaged recipe describes them."""
    recipe = read_recipe(find_recipe(name))
    settings, callbacks = recipe.get("model") or {}, (recipe.get("trainer") or {}).get("callbacks") or []
    hollowing = [one["init_args"] for one in callbacks if _named(one) == HollowedActivations.__name__]
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(PersonalizationModule, "model")

    def make(precision: str, checkpointing: bool | None) -> PersonalizationModule:
        model = settings | {"precision": precision}
        if checkpointing is not None:
            model["checkpointing"] = checkpointing
        module = parser.instantiate_classes(parser.parse_object({"model": model})).model
        for asked in hollowing:
            module.hollow_out(HollowedActivations(**asked))
        return module

    return make


def _named(part: dict[str, Any]) -> str:
    """A part's class without its module, which config.yaml names too."""
    return str(part["class_path"]).rpartition(".")[2]


def available_precisions() -> list[str]:
    """What a base can be kept in here: int4 is missing where its layers could not even be rehearsed."""
    return [name for name in PRECISIONS if name != "int4" or why_not_int4() is None]


def choose(request: FitRequest, size: str) -> tuple[FitRequest, Budget]:
    """Let the plan choose what a request leaves open: method, precision, checkpointing, streaming and strategy.

    Args:
        request: what the command line asks for. A method that a recipe names stays, and so does what the command line
            or a recipe of the user's own says of the rest; the packaged recipes' precisions are only defaults.
        size: the budget of each device, such as 4GB.

    Returns:
        The request with the choice in it, and the budget that the run is held to.

    Raises:
        UserError: nothing fits.
    """
    accelerator = request.value("trainer.accelerator")
    device = "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    budget = Budget(parse_size(size), device)
    if budget.tensors <= 0:
        raise UserError(
            f"--budget {size}: a process takes about {human(overhead(device))} before its first tensor; give more."
        )
    named = request.value("model.method")
    if named not in (None, *METHODS):
        raise UserError(f"method {named!r} is unknown: choose one of {', '.join(METHODS)}.")
    precision, *wanted = (request.own(f"model.{key}") for key in ("precision", "offload", "checkpointing"))
    if precision not in (None, *PRECISIONS):
        raise UserError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}.")
    resolution, batch_size, pictures = (
        int(value) if str(value).isdecimal() else None
        for value in map(request.value, ("data.resolution", "data.batch_size", "samples.batch_size"))
    )
    devices, strategy = _shared(request, device)
    base = request.value("model.base") or "tiny"
    if identify(base).family != "tiny" and not request.says("print_config"):
        say(
            f"Looking for what fits into {size}: methods are rehearsed on {base} without its weights, a minute perhaps."
        )
    left_out: dict[str, str] = {}

    def rehearsed(methods: Sequence[str]) -> list[Row]:
        return plan(
            {name: recipe(name) for name in methods},
            base,
            resolution=resolution,
            batch_size=batch_size or 1,
            pictures=pictures,
            device=device,
            precisions=[precision] if precision else available_precisions(),
            activations=str(request.value("model.activations") or "auto"),
            devices=devices,
            strategy=strategy,
            left_out=left_out.__setitem__,
            asked=lambda *switches: all(w is None or _same(s, w) for s, w in zip(switches, wanted, strict=True)),
        )

    taken, rows = first_fit(METHODS if named is None else [named], rehearsed, budget)
    if not rows and left_out:
        raise UserError(f"--budget {size}: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}.")
    if not rows:
        raise UserError(f"--budget {size}: no method runs with what is asked for; leave one of its switches out.")
    if taken is None:
        has_photos = min(rows, key=lambda row: row.needed_bytes).peak_phase not in GENERATING
        smaller = ", or a lower --data.resolution" if has_photos else ""
        raise UserError(f"--budget {size}: {least(rows, device)}; give more{smaller}.")
    if not request.says("print_config"):
        each = f", on each of {devices} devices" if devices > 1 else ""
        say(
            f"Into {size} fits {taken}: {human(taken.peak_bytes)} at its peak ({taken.peak_phase}), and about "
            f"{human(overhead(device) + taken.workspaces_bytes)} beside tensors{each}."
        )
    path = find_recipe(taken.method)
    known = any(path == other for other, _ in request.recipes)
    recipes = request.recipes if known else [(path, read_recipe(path)), *request.recipes]
    chosen = taken.settings
    if taken.strategy is not None and request.value("trainer.strategy") in (None, "auto"):
        chosen += ["--trainer.strategy", taken.strategy]
    return replace(request, recipes=recipes, settings=[*request.settings, *chosen]), budget


def _shared(request: FitRequest, device: str) -> tuple[int, str | None]:
    """How many processes would share a run, and by which strategy, where it is one of those that a plan knows.

    One where the Trainer will say what is wrong.
    """
    kind: Any = CUDAAccelerator if device == "cuda" else CPUAccelerator
    devices, nodes, strategy = (request.value(f"trainer.{key}") for key in ("devices", "num_nodes", "strategy"))
    try:
        asked = yaml.safe_load(str(devices or 1))
        found = kind.parse_devices(kind.auto_device_count() if asked == "auto" else asked)
        count = len(kind.get_parallel_devices(found)) * int(nodes or 1)
    except (MisconfigurationException, TypeError, ValueError, yaml.YAMLError):
        count = 1
    if str(strategy).startswith(DDP):  # with its variants, as ddp_spawn
        return count, DDP
    return count, strategy if strategy in STRATEGIES else None


def _same(value: object, asked: object) -> bool:
    """Whether a row has what was asked for, which a command line says in words."""
    return str(value).lower() == str(asked).lower()


def least(rows: Sequence[Row], device: str) -> str:
    """What needs the least, in words."""
    row = min(rows, key=lambda row: row.needed_bytes)
    return f"the least, {row}, needs {human(row.needed_bytes + overhead(device))}"


def refuse_too_large(
    module: PersonalizationModule,
    data: SubjectData,
    samples: Samples,
    device: torch.device,
    budget: Budget | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    resumed: bool = False,
    ranks: Ranks = ALONE,
    processes: int = 1,
    subjects: int = 1,
) -> None:
    """Compare a run's plan with its budget, and with what is free on its device, before anything is loaded.

    Args:
        module: as it will be trained; it stays fresh.
        data: its photos.
        samples: the pictures that are drawn in between.
        device: where.
        budget: what it may take at most.
        callbacks: the Trainer's, some of which change what a step takes.
        resumed: whether the run was begun earlier, and its method stays.
        ranks: the processes that share the run.
        processes: that share a CPU's memory.
        subjects: that are trained in one batch.

    Raises:
        TooLargeError: the run would not fit.
    """
    family = identify(module.base_name).family
    if family == "tiny" and budget is None:  # fits wherever torch does
        return
    found = module.open(device, weights=False)
    side = found.resolution if data.resolution == "auto" else int(data.resolution)
    drawn = samples.count if samples.prompts is None else len(samples.prompts)
    together = defaults.lookup(module.method, family, module.precision)["sampling_batch"]
    together = together if samples.batch_size == "auto" else int(samples.batch_size)
    rehearsed, batch_size = copy.deepcopy(module), data.batch_size
    rehearsed.ranks = ranks
    for callback in callbacks:
        if isinstance(callback, HollowedActivations):
            rehearsed.hollow_out(copy.copy(callback))
        if isinstance(callback, PriorPreservation):
            batch_size *= 2
    pictures = min(drawn, together)
    (phases,) = rehearse([rehearsed], found, side, batch_size=batch_size, pictures=pictures, subjects=subjects)
    mapped = module.offload == "stream" and device.type == "cpu"  # the system may drop such weights
    needs = {name: peak.needed - (peak.weights if mapped else 0) for name, peak in phases.items()}
    highest = max(needs, key=lambda name: needs[name])
    peak = needs[highest]
    if budget is not None and peak > budget.tensors:
        raise TooLargeError(
            f"with its other settings this run would take {human(peak)} ({highest}), and the budget leaves "
            f"{human(max(budget.tensors, 0))}: leave the settings out that make it larger, or give more."
        )
    free = free_bytes(device) // (processes if device.type == "cpu" else 1)
    if peak > free:
        if resumed:
            mend = "--model.offload stream, --model.checkpointing true and --samples.batch_size 1 take less"
        else:
            sizes: dict[str, Any] = {"resolution": side, "batch_size": data.batch_size, "devices": ranks.world}
            mend = _mend(
                module, device, free, sizes if samples.batch_size == "auto" else sizes | {"pictures": together}
            )
        raise TooLargeError(
            f"this run would take {human(peak)} ({highest}), and {human(free)} are free on {device}: "
            f"{mend}; --no-plan tries it all the same."
        )


def _mend(module: PersonalizationModule, device: torch.device, free: int, sizes: Mapping[str, Any]) -> str:
    """What would fit, of runs of these sizes (as for `plan`)."""

    def rehearsed(methods: Sequence[str]) -> list[Row]:
        return plan(
            {name: recipe(name) for name in methods},
            module.base_name,
            device=device.type,
            precisions=available_precisions(),
            activations=module.activations,
            **sizes,
        )

    fitting, rows = first_fit(METHODS, rehearsed, Budget(free, device.type))
    return f"--budget {human(free).replace(' ', '')} takes what fits" if fitting else least(rows, device.type)
