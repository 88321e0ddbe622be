"""What `mep plan` says of the runs of a comparison, beside what they were measured to take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mep_lightning
from mep_lightning.bases.families import locate
from mep_lightning.bases.single_file import is_single_file
from mep_lightning.commands.budget import recipe
from mep_lightning.commands.recipes import read_recipe
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.table import Record, is_number
from mep_lightning.errors import UserError
from mep_lightning.plan import Row, plan
from mep_lightning.run_folder import kind_of, write_atomically

PLANNED = ("training_planned", "inference_planned")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")


def planned(
    folder: ComparisonFolder, records: Sequence[Record], base: str, rehearse: bool = True
) -> dict[str, dict[str, int]]:
    """Method -> `training_planned` and `inference_planned`, bytes of tensors, with the settings that its runs had.

    Where cells trained together, of the largest batch: what was measured is the largest, too. The folder keeps what was
    rehearsed, so that a comparison to which cells are added rehearses no method again; without `rehearse` that is all
    that is told, and no run is looked at.
    """
    kept = _kept(folder)
    if not rehearse:
        methods = {record["method"] for record in records}
        return {method: {key: one[key] for key in PLANNED} for method, one in kept.items() if method in methods}
    together: dict[str, int] = {}
    runs: dict[str, tuple[Path, str]] = {}
    for record in records:
        method, config = record["method"], folder.config(record["method"], record["subject"], record["seed"])
        size = int(record["batch"]) if is_number(record.get("batch")) else 1
        together[method] = max(together.get(method, 1), size)
        if "error" not in record and config.is_file():
            runs.setdefault(method, (config, device_of(record)))
    found = {}
    for method, (config, device) in runs.items():
        try:
            settings = read_recipe(config)
            of = _digest(settings, base, device, together[method])
        except (UserError, OSError, KeyError, TypeError):  # the base or its hub is out of reach, or the file damaged
            continue
        if kept.get(method, {}).get("of") != of:
            row = rehearsed(config, base, settings, device, together[method])
            if row is None:
                continue
            kept[method] = {"of": of, **dict(zip(PLANNED, (row.peak_bytes, row.inference_peak_bytes), strict=True))}
            with suppress(OSError):
                write_atomically(folder.plans, json.dumps(kept, indent=2) + "\n")
        found[method] = {key: kept[method][key] for key in PLANNED}
    return found


def device_of(record: Record) -> str:
    """What a cell ran on, "cpu" or "cuda"; where it does not say, what there is here."""
    return kind_of(record.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def _digest(settings: Mapping[str, Any], base: str, device: str, together: int) -> str:
    """Of what a plan depends on: settings, the base's description, and the code that rehearses."""
    model = {key: value for key, value in settings["model"].items() if key != "seed"}
    data = {key: value for key, value in (settings.get("data") or {}).items() if key in ("resolution", "batch_size")}
    callbacks = (settings.get("trainer") or {}).get("callbacks")
    told = json.dumps([model, data, callbacks, base, device, together], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode() + _code())
    for path in sorted(locate(base, weights=False).rglob("*.json")):
        digest.update(path.read_bytes())
    if is_single_file(base):
        digest.update(str(Path(base).expanduser().stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


@cache
def _code() -> bytes:
    """A hash of this package, and of the versions of those that its rehearsals run in."""
    digest = hashlib.sha256()
    for path in sorted(Path(mep_lightning.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}".encode())
    return digest.digest()


def _kept(folder: ComparisonFolder) -> dict[str, dict[str, Any]]:
    """What was rehearsed earlier, without entries that are damaged."""
    try:
        kept = json.loads(folder.plans.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {method: one for method, one in kept.items() if _is_whole(one)} if isinstance(kept, dict) else {}


def _is_whole(entry: object) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("of"), str) and all(is_number(entry.get(k)) for k in PLANNED)
    )


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
