"""What is looked at before hours of cells: a mistake that every one of them would tell is told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mep_lightning.adapters.adapter import STYLE
from mep_lightning.bases import identify
from mep_lightning.commands.chatter import quiet_after_imports
from mep_lightning.commands.fit import requested
from mep_lightning.commands.learned import Learned
from mep_lightning.commands.settings import FREE_TO_CHANGE, flat
from mep_lightning.commands.test import texts
from mep_lightning.commands.training import FitCLI
from mep_lightning.comparison.cells import Cell
from mep_lightning.errors import UserError
from mep_lightning.evaluation import ClipEncoder, DinoEncoder, default_encoders
from mep_lightning.quantization import why_not_int4
from mep_lightning.run_folder import RunFolder

OWN_OF_A_CELL = ("model.seed", "model.base", "data.path", "data.class_word")
TRAINED_BY = tuple(
    f"trainer.{name}"
    for name in (
        *("max_steps", "max_epochs", "precision", "callbacks", "strategy", "devices"),
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    )
)
"""What of a Trainer decides what is learned, with all below it."""


class Settings(FitCLI):
    """A run's settings, every `auto` filled in, of which nothing is made: what runs it may be another machine."""

    def instantiate_classes(self) -> None:
        """Nothing."""


@dataclass
class Method:
    """What a method's cells are trained with.

    Attributes:
        settings: by dotted key, all that decides what is learned and is not a cell's own.
        is_style: whether it learns a style, which has no class word.
        devices: as the Trainer is told.
    """

    settings: dict[str, Any]
    is_style: bool
    devices: Any


def read_method(cell: Cell, class_word: str, templates: Sequence[str] | None, is_here: bool) -> Method | None:
    """Read the command line of a method's cell as `mep fit` would, and find its mistakes.

    Args:
        cell: one of the method's.
        class_word: of its subject.
        templates: prompts that cells are scored with; None for the base's own.
        is_here: whether cells run on this machine, so that its packages and devices are theirs.

    Returns:
        What it is trained with; None where a budget is to choose it.

    Raises:
        UserError: the first mistake.
    """
    quiet_after_imports()
    with TemporaryDirectory() as nowhere:
        request, options = requested([*cell.fit, "--run", f"{nowhere}/run"])  # whatever there is of its own already
        if options.budget:
            return None
        cli = (FitCLI if is_here else Settings)(request)
    config = cli.config
    if is_here:
        if config.model.precision == "int4" and (why := why_not_int4()) is not None:
            raise UserError(f"--methods {cell.method} takes the base in int4: {why}.")
        learned = Learned(cli.model, RunFolder(cell.run), {}, class_word, {}, torch.device("cpu"))
        texts(learned, templates)
    else:
        token = (config.model.adapter or {}).get("init_args", {}).get("token", "<sks>")
        for template in templates or ():
            if "{" not in template and str(token) not in template:
                raise UserError(f"--prompts: {template!r} lacks the subject; put {{}} where it goes.")
    told = {key: value for part in ("model", "data") for key, value in flat(part, config[part].as_dict())}
    told |= {key: value for key, value in flat("trainer", config.trainer.as_dict()) if key.startswith(TRAINED_BY)}
    own = (*OWN_OF_A_CELL, *FREE_TO_CHANGE)
    settings = {key: value for key, value in told.items() if key not in own}
    return Method(settings, config.data.templates == STYLE, config.trainer.devices)


def refuse_encoders(clip: str | None, dino: str | None, base: str) -> None:
    """Open what pictures are scored with, and let go of it.

    Args:
        clip, dino: as for `mep test`.
        base: whose default they are where they are None.

    Raises:
        UserError: one is not to be had, or no such network.
    """
    quiet_after_imports()
    usual = default_encoders(identify(base).family)
    ClipEncoder(clip or usual[0])
    DinoEncoder(dino or usual[1])


def gpus_of(methods: Mapping[str, Method | None], workers: int) -> list[str]:
    """The GPUs that processes share out among themselves; none where there is one, or where a run asks for its own."""
    if workers == 1 or any(method is None or method.devices not in (1, "1", "auto") for method in methods.values()):
        return []
    return visible_gpus()


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; none where there is one or none."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = named[:count] if named else [str(index) for index in range(count)]
    return names if len(names) > 1 else []
