"""Attention without the [S, T] matrix in memory: PyTorch's own, or on some CPUs oneDNN's products, block by block."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.attention import reference
from mep_lightning.kernels.dispatch import defined_by
from mep_lightning.kernels.products import linear, prefers_onednn, runs_onednn

__all__ = ["attention"]

BLOCK = 2**20
"""Scores at a time, 4 MiB of fp32: more leave the caches, fewer make products too small."""
LEAST = 2**16
"""Scores of a head below which one call of PyTorch's is faster than ours."""


@defined_by(reference.attention)
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v; scores and their sums are fp32 whatever the activations.

    Args:
        q: queries [B, H, S, D], any floating dtype.
        k, v: keys and values [B, H, T, D].

    Returns:
        [B, H, S, D] in q's dtype, lying in memory as [B, S, H, D].
    """
    narrow = q.dtype in (torch.float32, torch.bfloat16) and q.shape[-2] * k.shape[-2] >= LEAST
    if narrow and runs_onednn(q, k, v) and prefers_onednn() and not torch.is_autocast_enabled("cpu"):
        return _blockwise(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    rows = max(BLOCK // k.shape[-2], 1)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h].float() / math.sqrt(width)  # [T, D]
            values = v[b, h].T.contiguous()  # [D, T]
            for block, target in zip(q[b, h].split(rows), out[b, h].split(rows), strict=True):
                scores = linear(block.float(), keys)  # [rows, T]
                target.copy_(linear(scores.softmax(-1).to(q.dtype), values))
    return out
