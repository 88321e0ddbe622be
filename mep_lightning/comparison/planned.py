"""What `mep plan` says of the runs of a comparison, beside what they were measured to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mep_lightning.commands.budget import recipe
from mep_lightning.commands.recipes import read_recipe
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.table import Record, is_number
from mep_lightning.errors import UserError
from mep_lightning.plan import Row, plan
from mep_lightning.run_folder import RunFolder


def planned(folder: ComparisonFolder, records: Sequence[Record], base: str) -> dict[str, dict[str, int]]:
    """Method -> `training_planned` and `inference_planned`, bytes of tensors, with the settings that its runs had.

    Where cells trained together, of the largest batch: what was measured is the largest, too.
    """
    found: dict[str, dict[str, int]] = {}
    together: dict[str, int] = {}
    for record in records:
        size = int(record["batch"]) if is_number(record.get("batch")) else 1
        together[record["method"]] = max(together.get(record["method"], 1), size)
    for record in records:
        config = RunFolder(folder.run(record["method"], record["subject"], record["seed"])).config
        if record["method"] in found or "error" in record or not config.is_file():
            continue
        device = "cuda" if torch.cuda.is_available() else "cpu"
        row = rehearsed(config, base, read_recipe(config), device, together[record["method"]])
        if row is not None:
            found[record["method"]] = {
                "training_planned": row.peak_bytes,
                "inference_planned": row.inference_peak_bytes,
            }
    return found


def rehearsed(recipe_file: Path, base: str, settings: Mapping[str, Any], device: str, subjects: int = 1) -> Row | None:
    """The plan of a run; None where there is none for its settings.

    Args:
        recipe_file: what is trained and how.
        base: as for `load_base`.
        settings: of `model` (precision, activations, offload, checkpointing) and of `data` (resolution, batch_size).
        device: "cuda" or "cpu".
        subjects: how many train in one batch.
    """
    model, data = settings["model"], settings.get("data") or {}
    side = data.get("resolution")
    try:
        rows = plan(
            {recipe_file.stem: recipe(str(recipe_file))},
            base,
            resolution=side if isinstance(side, int) else None,
            batch_size=data.get("batch_size") or 1,
            device=device,
            precisions=[model.get("precision") or "fp32"],
            activations=model.get("activations") or "auto",
            pictures=1,
            subjects=subjects,
        )
    except UserError:
        return None
    wanted = bool(model.get("checkpointing")), model.get("offload") or "none"
    return next((one for one in rows if (one.checkpointing, one.offload) == wanted), None)
