"""Attention: the definition."""

from __future__ import annotations

import math

from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v. q [B, H, S, D], k and v [B, H, T, D] -> [B, H, S, D]."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
