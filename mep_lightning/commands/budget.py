"""The plan behind `mep fit`: what a budget lets a run be, and whether what it will be fits into what is free."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from lightning.pytorch.cli import LightningArgumentParser

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning import adapters as _adapters  # noqa: F401  (imported so that parts are found by their short names)
from mep_lightning import timesteps as _timesteps  # noqa: F401
from mep_lightning.bases import identify, open_base
from mep_lightning.bases.load import PRECISIONS
from mep_lightning.commands.recipes import find_recipe, read_recipe
from mep_lightning.commands.request import FitRequest, say
from mep_lightning.defaults import METHODS
from mep_lightning.errors import UserError
from mep_lightning.evaluation.plots import human
from mep_lightning.plan import Budget, Row, best, free_bytes, parse_size, plan, rehearse
from mep_lightning.plan.budget import OVERHEAD
from mep_lightning.quantization import why_not_int4


def recipe(name: str) -> Callable[[str, bool], PersonalizationModule]:
    """A maker of modules, by precision and checkpointing, as a packaged recipe describes them."""
    settings = read_recipe(find_recipe(name))["model"]
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(PersonalizationModule, "model")

    def make(precision: str, checkpointing: bool) -> PersonalizationModule:
        model = settings | {"precision": precision, "checkpointing": checkpointing}
        return parser.instantiate_classes(parser.parse_object({"model": model})).model

    return make


def available_precisions() -> list[str]:
    """What a base can be kept in here: int4 is missing where its layers could not even be rehearsed."""
    return [name for name in PRECISIONS if name != "int4" or why_not_int4() is None]


def choose(request: FitRequest, size: str) -> FitRequest:
    """Let the plan choose what a request leaves open: method, precision, checkpointing and streaming.

    Args:
        request: what the command line asks for; a method that a recipe names, and settings of the command line, stay.
        size: the budget, such as 4GB.

    Returns:
        The request with the choice in it.

    Raises:
        UserError: nothing fits.
    """
    device = "cpu" if request.value("trainer.accelerator") == "cpu" or not torch.cuda.is_available() else "cuda"
    budget = Budget(parse_size(size), device)
    named = request.value("model.method")
    methods = [name for name in METHODS if named in (None, name)]
    precision = request.setting("model.precision")
    resolution = request.value("data.resolution")
    rows = plan(
        {name: recipe(name) for name in methods},
        request.value("model.base") or "tiny",
        resolution=int(resolution) if str(resolution).isdecimal() else None,
        batch_size=int(request.value("data.batch_size") or 1),
        device=device,
        precisions=[precision] if precision else available_precisions(),
    )
    taken = best(rows, budget)
    if taken is None:
        raise UserError(f"--budget {size}: {least(rows, device)}; give more, or a lower --data.resolution.")
    say(
        f"Into {size} fits {taken}: {human(taken.peak_bytes)} at its peak ({taken.peak_phase}), and about "
        f"{human(OVERHEAD[device])} beside tensors."
    )
    path = find_recipe(taken.method)
    recipes = request.recipes if named else [*request.recipes, (path, read_recipe(path))]
    return replace(request, recipes=recipes, settings=[*request.settings, *taken.settings])


def least(rows: Sequence[Row], device: str) -> str:
    """What needs the least, in words."""
    row = min(rows, key=lambda row: row.peak_bytes)
    return f"the least, {row}, needs {human(row.peak_bytes + OVERHEAD[device])}"


def refuse_too_large(module: PersonalizationModule, data: SubjectData, device: torch.device, pictures: int) -> None:
    """Compare a run's plan with what is free on its device, before anything is loaded.

    Args:
        module: as it will be trained; it stays fresh.
        data: its photos.
        device: where.
        pictures: how many samples are drawn at once.

    Raises:
        UserError: the run would not fit.
    """
    if identify(module.base_name).family == "tiny":  # fits wherever torch does
        return
    found = open_base(module.base_name, module.precision, device, module.offload)
    side = found.resolution if data.resolution == "auto" else int(data.resolution)
    (phases,) = rehearse([copy.deepcopy(module)], found, side, batch_size=data.batch_size, pictures=pictures)
    highest = max(phases, key=lambda name: phases[name].total)
    peak, free = phases[highest].total, free_bytes(device)
    if peak > free:
        names = {name: recipe(name) for name in METHODS}
        rows = plan(names, module.base_name, resolution=side, device=device.type, precisions=available_precisions())
        fitting = best(rows, Budget(free, device.type))
        mend = f"--budget {human(free).replace(' ', '')} takes what fits" if fitting else least(rows, device.type)
        raise UserError(
            f"this run would take {human(peak)} ({highest}), and {human(free)} are free on {device}: {mend}; "
            "--no-plan tries it all the same."
        )
