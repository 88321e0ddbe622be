"""`cost`: what a million subjects take on SD1.5, worked out from measured seconds a step and the methods' own numbers.

A subject is a cell of its own: GPU seconds = steps x seconds a step. What is measured is a step; loading the base, the
encoding of photos, sample pictures, scores and idle GPUs are left out, so that these are lower bounds.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.documents.markdown import markdown
from benchmarks.rows import Row
from mep_lightning import defaults
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases.skeleton import architecture
from mep_lightning.distributed import COMPARED_EVERY
from mep_lightning.estimators import RandomGradientEstimator

SUBJECTS = 10**6
BASE, FAMILY, PRECISION = "sd15", "sd1", "int8"
NODE, NODES = 8, 100
"""GPUs of a node, and nodes."""
STEP = "sd15 int8 n=2, fp16 activations, graph"
"""The measured step: as a run takes it on a GPU."""
TIMED = ("zoodip", "zoodip_fast", "textual_inversion", "textual_inversion_lite")
"""Methods that are told from the suite `methods`."""
HOUR, DAY = 3600, 86_400


@dataclass(frozen=True)
class Cost:
    """What many subjects take.

    Attributes:
        seconds: of a GPU, a step.
        steps: of a subject.
        subjects: how many.
    """

    seconds: float
    steps: int
    subjects: int = SUBJECTS

    @property
    def minutes(self) -> float:
        """Of a subject."""
        return self.seconds * self.steps / 60

    @property
    def gpu_hours(self) -> float:
        """Of all subjects."""
        return self.seconds * self.steps * self.subjects / HOUR

    def days(self, gpus: int) -> float:
        """Until all subjects are done on so many GPUs, none of which ever waits."""
        return self.gpu_hours * HOUR / gpus / DAY


def values(method: str) -> dict[str, Any]:
    """A method's own numbers."""
    return defaults.lookup(method, FAMILY, PRECISION)


def members(method: str) -> int:
    """Forward passes of a zeroth-order step."""
    return RandomGradientEstimator(n=values(method)["n"]).members


def token_bytes() -> int:
    """Of an exported token."""
    width = json.loads((architecture(BASE) / "text_encoder" / "config.json").read_text())["hidden_size"]
    adapter = TokenEmbedding()
    adapter.theta = nn.Parameter(torch.zeros(1, width))
    with tempfile.TemporaryDirectory() as folder:
        return sum(path.stat().st_size for path in adapter.export(Path(folder)))


def exchanged_bytes(method: str) -> int:
    """That a process sends where one subject's members are shared out (`zo_ddp`), under `mep fit`.

    A loss a member and whether to stop, every step; sums of bits every COMPARED_EVERY steps, and for a new subspace.
    """
    own = values(method)
    loss, number = torch.float32.itemsize, torch.int64.itemsize
    compared = own["max_steps"] // COMPARED_EVERY + (own["max_steps"] // own["tau"] if "tau" in own else 0)
    return own["max_steps"] * (loss * members(method) + number) + 2 * number * compared


def of_a_step(rows: list[Row]) -> str:
    """Tables of time, storage and network from the profile of a step of n=2; of more members in proportion."""
    profiled = {row["metric"]: row["value"] for row in rows if row["case"] == STEP}
    base = members("zoodip")
    lines = []
    for method in ("zoodip", "zoodip_fast"):
        share = members(method) / base
        scaled = "" if share == 1 else f", {members(method)} members as {share:.2f} times {base}"
        for metric, how in (("seconds a step", ""), ("seconds at work", ", no gaps between kernels")):
            cost = Cost(profiled[metric] * share, values(method)["max_steps"])
            lines.append(_line(f"{method}{scaled}{how}", cost))
    return f"{_times(lines)}\n{_kept()}"


def of_methods(rows: list[Row]) -> str:
    """A table of time from every method's own measured step."""
    seconds = {row["case"]: row["value"] for row in rows if row["metric"] == "seconds a training step"}
    found = {method: seconds.get(f"{BASE} {PRECISION} {method}") for method in TIMED}
    return _times(
        [_line(method, Cost(one, values(method)["max_steps"])) for method, one in found.items() if one is not None]
    )


def _line(name: str, cost: Cost) -> list[str]:
    figures = (f"{1e3 * cost.seconds:.1f}", f"{cost.steps:,}", f"{cost.minutes:.1f}", f"{cost.gpu_hours:,.0f}")
    return [name, *figures, f"{cost.days(NODE):,.0f}", f"{cost.days(NODE * NODES):,.1f}"]


def _times(lines: list[list[str]]) -> str:
    header = ["a million subjects", "ms a step", "steps", "minutes a subject", "GPU hours", f"days, {NODE} GPUs"]
    return markdown([*header, f"days, {NODES} × {NODE} GPUs"], lines)


def _kept() -> str:
    """What is left of subjects, and what is sent where several GPUs share each of them."""
    token = token_bytes()
    lines = []
    for method in ("zoodip", "zoodip_fast"):
        sent = exchanged_bytes(method)
        kept = (f"{token / 1e3:.2f}", f"{token * SUBJECTS / 1e9:.1f}")
        lines.append([method, *kept, f"{sent / 1e3:.0f}", f"{sent * SUBJECTS / 1e9:.0f}"])
    header = ["a million subjects", "a token, kB", "all tokens, GB", "sent by a process of `zo_ddp`, kB a subject"]
    return markdown([*header, "of all subjects, GB"], lines)
