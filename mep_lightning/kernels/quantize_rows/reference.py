"""Symmetric int8, one scale a row: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # symmetric: -128 stays unused


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [O, ...] -> q int8 [O, ...] in [-127, 127] and scale fp32 [O] (1 for a row of zeros), with x ~ q * scale.

    The scale of a row with a NaN is NaN, so that what comes of it is no number either.
    """
    x = x.detach().float()
    scale = x.flatten(1).abs().amax(1) / LEVELS
    scale = torch.where(scale == 0, 1.0, scale)
    q = (x / scale.view(-1, *[1] * (x.dim() - 1))).round_().clamp_(-LEVELS, LEVELS)
    return q.to(torch.int8), scale
