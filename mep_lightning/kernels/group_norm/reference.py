"""A group norm: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """w (x - m) / s + b over the pixels of a group of channels. x [B, C, *pixels] -> the same."""
    return F.group_norm(x, groups, weight, bias, eps)
