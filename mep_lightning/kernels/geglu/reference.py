"""A gated linear unit's gate: the definition (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def geglu(x: Tensor) -> Tensor:
    """a gelu(b) of x = [a, b]. x [..., 2 C] -> [..., C]."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)
