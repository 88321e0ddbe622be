"""int8 back to floating point: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def per_output(scale: Tensor, ndim: int) -> Tensor:
    """View scale [O] as [O, 1, ...] with `ndim` dimensions."""
    return scale.view(-1, *[1] * (ndim - 1))


def dequantize_reference(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: q [O, ...] times scale [O] in fp32 (in fp64 for an fp64 weight), rounded once -> [O, ...]."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q.to(wide) * per_output(scale, q.dim()).to(wide)).to(dtype)
