"""How much of a GPU a cell asks for, so that as many share one as fit into its memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mep_lightning.commands.request import read_request
from mep_lightning.comparison.planned import rehearsed
from mep_lightning.plan.budget import overhead

SCORING = 3 * 2**28
"""Bytes of the networks that score pictures beside the base: CLIP ViT-B/32 and DINO ViT-S/16 in fp32 (660 MiB), and
what they answer."""
PARTS = 10_000
"""Ray counts a GPU in ten-thousandths."""


def gpu_share(peak: int | None, total: int) -> float:
    """min(1, (peak + overhead) / total), rounded up to a ten-thousandth: cells that share a GPU stay below its memory.

    Args:
        peak: bytes that a cell takes at most, beside CUDA's context; None where nothing is known, and a GPU is not
            shared.
        total: bytes of the GPU.
    """
    if peak is None:
        return 1.0
    return min(1.0, math.ceil(PARTS * (peak + overhead("cuda")) / total) / PARTS)


def peak_of_cells(recipe: Path, base: str, fit: Sequence[str], together: int = 1) -> int | None:
    """Bytes on a GPU of cells that train together: the plan's peak of their run, or of drawing with what scores beside
    it, which each does by itself, and libraries' workspaces.

    Args:
        recipe: the method's.
        base: as for `load_base`.
        fit: the words of the command line for every `mep fit`; of them precision, activations, offload, checkpointing,
            resolution and batch size count.
        together: how many train in one batch.
    """
    request = read_request([str(recipe)], list(fit), None, False)
    settings: dict[str, Any] = {key: request.value(key) for key in KEYS}
    row = rehearsed(recipe, base, _parts(settings), device="cuda", subjects=together)
    if row is None:
        return None
    return max(row.peak_bytes, row.inference_peak_bytes + SCORING) + row.workspaces_bytes


KEYS = (
    *("model.precision", "model.activations", "model.offload", "model.checkpointing"),
    *("data.resolution", "data.batch_size"),
)


def _parts(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted keys as sections; words of a command line as what they stand for."""
    found: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        found[section][name] = yaml.safe_load(value) if isinstance(value, str) else value
    return found
