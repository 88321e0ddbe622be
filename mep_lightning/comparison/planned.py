"""What `mep plan` says of the runs of a comparison, beside what they were measured to take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mep_lightning.commands.budget import recipe
from mep_lightning.commands.recipes import read_recipe
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.table import Record
from mep_lightning.errors import UserError
from mep_lightning.plan import plan
from mep_lightning.run_folder import RunFolder


def planned(folder: ComparisonFolder, records: Sequence[Record], base: str) -> dict[str, dict[str, int]]:
    """Method -> `training_planned` and `inference_planned`, bytes of tensors, with the settings that its runs had."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        config = RunFolder(folder.run(record["method"], record["subject"], record["seed"])).config
        if record["method"] in found or "error" in record or not config.is_file():
            continue
        settings = read_recipe(config)
        model, data = settings["model"], settings.get("data") or {}
        side = data.get("resolution")
        try:
            rows = plan(
                {record["method"]: recipe(str(config))},
                base,
                resolution=side if isinstance(side, int) else None,
                batch_size=data.get("batch_size") or 1,
                device="cuda" if torch.cuda.is_available() else "cpu",
                precisions=[model["precision"]],
                activations=model.get("activations") or "auto",
                pictures=1,
            )
        except UserError:
            continue
        wanted = bool(model.get("checkpointing")), model.get("offload") or "none"
        row = next((one for one in rows if (one.checkpointing, one.offload) == wanted), None)
        if row is not None:
            found[record["method"]] = {
                "training_planned": row.peak_bytes,
                "inference_planned": row.inference_peak_bytes,
            }
    return found
