"""What `mep plan` says of the runs of a comparison, beside what they were measured to take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mep_lightning
from mep_lightning.commands.budget import recipe
from mep_lightning.commands.recipes import read_recipe
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.table import Record, is_number
from mep_lightning.errors import UserError
from mep_lightning.plan import Row, plan
from mep_lightning.run_folder import write_atomically

PLANNED = ("training_planned", "inference_planned")


def planned(folder: ComparisonFolder, records: Sequence[Record], base: str) -> dict[str, dict[str, int]]:
    """Method -> `training_planned` and `inference_planned`, bytes of tensors, with the settings that its runs had.

    Where cells trained together, of the largest batch: what was measured is the largest, too. The folder keeps what was
    rehearsed, so that a comparison to which cells are added rehearses no method again.
    """
    kept = _kept(folder)
    together: dict[str, int] = {}
    configs: dict[str, Path] = {}
    for record in records:
        method, config = record["method"], folder.config(record["method"], record["subject"], record["seed"])
        size = int(record["batch"]) if is_number(record.get("batch")) else 1
        together[method] = max(together.get(method, 1), size)
        if "error" not in record and config.is_file():
            configs.setdefault(method, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for method, config in configs.items():
        settings = read_recipe(config)
        of = _digest(settings, base, device, together[method])
        if kept.get(method, {}).get("of") != of:
            row = rehearsed(config, base, settings, device, together[method])
            peaks = (row.peak_bytes, row.inference_peak_bytes) if row else (None, None)
            kept[method] = {"of": of, **dict(zip(PLANNED, peaks, strict=True))}
            write_atomically(folder.plans, json.dumps(kept, indent=2) + "\n")
        if kept[method][PLANNED[0]] is not None:
            found[method] = {key: kept[method][key] for key in PLANNED}
    return found


def _digest(settings: Mapping[str, Any], base: str, device: str, together: int) -> str:
    """Of all that a plan depends on; what a cell alone has, such as its photos and its seed, matters to none."""
    model = {key: value for key, value in settings["model"].items() if key != "seed"}
    data = {key: value for key, value in (settings.get("data") or {}).items() if key in ("resolution", "batch_size")}
    callbacks = (settings.get("trainer") or {}).get("callbacks")
    versions = mep_lightning.__version__, torch.__version__
    told = json.dumps([model, data, callbacks, base, device, together, versions], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _kept(folder: ComparisonFolder) -> dict[str, Any]:
    """What was rehearsed earlier; nothing where the file is damaged."""
    try:
        kept = json.loads(folder.plans.read_text(encoding="utf-8"))
        whole = all({"of", *PLANNED} <= set(one) for one in kept.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return kept if whole else {}


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
