"""What fits into a budget: which recipe to take, and what each switch saves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mep_lightning.defaults import TOKENS
from mep_lightning.errors import UserError
from mep_lightning.plan.rows import Row

CGROUP = Path("/sys/fs/cgroup")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
OVERHEAD = {"cuda": 2**29, "cpu": 2**29}
"""Bytes of a process before its first tensor: CUDA's context, or the interpreter with torch and diffusers."""
PREFERENCE = (
    ("lora",),
    ("hollowed_net",),
    ("textual_inversion_lite", "textual_inversion"),
    ("qlora",),
    ("lora_r1",),
    ("tuneqdm",),
    ("peqa",),
    ("selective",),
    ("zoodip", "zoodip_fast"),
    ("gf_ti",),
    ("dreambooth",),
)
"""Methods from the one to take first, those that train alike together: exact gradients before estimated ones, which
need many times the steps; a LoRA before a token, as it holds more of the subject; last the one that takes most and, in
the papers, gives no more."""
STAGES = (PREFERENCE[:1], PREFERENCE[1:5], PREFERENCE[5:])
"""What `first_fit` rehearses together: mostly the first fits, and one base that is set up serves several."""
BITS = ("fp32", "bf16", "fp16", "int8", "int4")
PRECISION_PREFERENCE = dict.fromkeys(TOKENS, ("fp32", "int8", "bf16", "fp16", "int4"))  # half precision drowns mu
SWITCHES = ("method", "precision", "offload", "checkpointing")


def overhead(device: str) -> int:
    """Bytes of a process before its first tensor, on a kind of device."""
    return OVERHEAD.get(device, OVERHEAD["cpu"])


@dataclass(frozen=True)
class Budget:
    """Memory that a run may take on each of its devices.

    Attributes:
        size: bytes, everything included.
        device: "cuda" or "cpu".
    """

    size: int
    device: str

    @property
    def tensors(self) -> int:
        """Bytes left for tensors and libraries' workspaces."""
        return self.size - overhead(self.device)

    def fits(self, row: Row) -> bool:
        return row.needed_bytes <= self.tensors


def parse_size(text: str) -> int:
    """Bytes of "4GB" (10^9), "4GiB" (2^30), "800M" or plain bytes.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget is {text!r}; give a size such as 4GB or 3.5GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def best(rows: Iterable[Row], budget: Budget) -> Row | None:
    """The recipe to take: of those that fit, by method, then resident, then the most bits; None fits none."""

    def rank(row: Row) -> tuple[int, ...]:
        place, alike = next((i, alike) for i, alike in enumerate(PREFERENCE) if row.method in alike)
        bits = PRECISION_PREFERENCE.get(row.method, BITS).index(row.precision)
        return place, row.offload != "none", bits, row.checkpointing, alike.index(row.method)

    return min(filter(budget.fits, rows), key=rank, default=None)


def first_fit(
    names: Collection[str], rehearsed: Callable[[Sequence[str]], Iterable[Row]], budget: Budget
) -> tuple[Row | None, list[Row]]:
    """`best` of some methods, of which no more are rehearsed than it takes.

    Args:
        names: the methods that may be taken.
        rehearsed: some of them -> their rows.
        budget: what the row must fit into.

    Returns:
        The recipe to take, and the rows that were rehearsed: all of them where nothing fits.
    """
    rows: list[Row] = []
    for stage in STAGES:
        if some := [name for alike in stage for name in alike if name in names]:
            rows += rehearsed(some)
            if taken := best(rows, budget):
                return taken, rows
    return None, rows


def savings(rows: Sequence[Row], taken: Row) -> Iterator[tuple[str, int]]:
    """What one switch would save against a row: a description and bytes, the largest saving first."""
    found = []
    for row in rows:
        changed = [key for key in SWITCHES if getattr(row, key) != getattr(taken, key)]
        if len(changed) == 1 and row.peak_bytes < taken.peak_bytes:
            value = json.dumps(getattr(row, changed[0])).strip('"')
            switch = f"--config {value}" if changed == ["method"] else f"--model.{changed[0]} {value}"
            found.append((switch, taken.peak_bytes - row.peak_bytes))
    yield from sorted(found, key=lambda saving: -saving[1])


def free_bytes(device: torch.device) -> int:
    """What a device has free now; on a CPU no more than the container's own limit leaves."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached  # what an earlier run in this process left
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return available
    used -= int(stat.get("inactive_file", 0))  # files that were read and may be dropped
    return min(available, max(limit - used, 0))
