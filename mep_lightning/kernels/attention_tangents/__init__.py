"""Attention together with its derivatives along n directions, without a long sequence's [S, T] matrix in memory.

On a CPU the softmax is taken once for all of them: n + 1 members of a finite difference need it n + 1 times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mep_lightning.kernels.attention_tangents import reference
from mep_lightning.kernels.dispatch import defined_by, needs_reference, runs_triton
from mep_lightning.kernels.products import linear

__all__ = ["attention_tangents"]

BLOCK = 2**20
"""Scores at a time, of each of the matrices that a block needs."""
FEW = 2**26
"""Multiplications of all heads and directions that are so few that calls cost more: then all are done at once."""


@torch.library.custom_op("mep_lightning::attention_tangents", mutates_args=())
def _attention_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if runs_triton(q):
        from mep_lightning.kernels.attention_tangents import triton

        if triton.takes(q):
            return triton.attention_tangents(q, k, v)
    return _together(q, k, v) if q.numel() * k.shape[-2] <= FEW else _blockwise(q, k, v)


@_attention_tangents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _room(q)


def _room(q: Tensor) -> Tensor:
    count, batch, heads, queries, width = q.shape
    return q.new_empty(count, batch, queries, heads, width).transpose(2, 3)


def _computes_in(q: Tensor) -> torch.dtype:
    """What products with values are taken in: a CPU's fp16 ones crawl."""
    return torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype


def _together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads at once."""
    out, dtype = _room(q), _computes_in(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(wide), k.to(wide) / math.sqrt(q.shape[-1]), v.to(dtype)
    share = (queries[0] @ keys[0].mT).softmax(-1)  # [B, H, S, T]
    moved = (queries[1:] @ keys[0].mT).add_(queries[0] @ keys[1:].mT).mul_(share)  # [n, B, H, S, T]
    moved.addcmul_(share, moved.sum(-1, keepdim=True), value=-1)
    share = share.to(dtype)
    out[0] = share @ values[0]
    out[1:] = (moved.to(dtype) @ values[0]).add_(share @ values[1:])
    return out


def _blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A block of queries of a head after the other; scores and their sums in fp32 at least."""
    count, batch, heads, _, width = q.shape
    out, wide = _room(q), torch.promote_types(q.dtype, torch.float32)
    dtype = _computes_in(q)
    rows, root = max(BLOCK // k.shape[-2], 1), math.sqrt(width)
    for b in range(batch):
        for h in range(heads):
            keys = k[:, b, h].to(wide) / root  # [1 + n, T, D]
            both = torch.cat([keys[1:], keys[:1].expand(count - 1, -1, -1)], -1)  # [n, T, 2 D]: dS = [q, dq] [dk, k]'
            values = v[:, b, h].mT.to(dtype).contiguous()  # [1 + n, D, T]
            for block, target in zip(q[:, b, h].split(rows, 1), out[:, b, h].split(rows, 1), strict=True):
                block = block.to(wide)
                share = linear(block[0], keys[0]).softmax(-1)  # [rows, T]
                told = linear(share.to(dtype), values.flatten(0, 1)).unflatten(-1, (count, width))  # P [v, dv]
                target.copy_(told.movedim(1, 0))
                for i in range(1, count):
                    moved = linear(torch.cat([block[0], block[i]], -1), both[i - 1]).mul_(share)
                    moved.addcmul_(share, moved.sum(-1, keepdim=True), value=-1)
                    target[i] += linear(moved.to(dtype), values[0])
    return out


@defined_by(reference.attention_tangents)
def attention_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v and its derivatives along n directions.

    Args:
        q: queries [1 + n, B, H, S, D], the value first and then the tangents; any floating dtype.
        k, v: keys and values [1 + n, B, H, T, D].

    Returns:
        [1 + n, B, H, S, D] in q's dtype, lying in memory as [1 + n, B, S, H, D].

    Raises:
        ValueError: the shapes are others.
    """
    fits = q.dim() == 5 and k.shape == v.shape and k.shape == (*q.shape[:3], k.shape[-2], q.shape[-1])
    if not fits:
        raise ValueError(f"queries {list(q.shape)} do not go with keys {list(k.shape)} and values {list(v.shape)}")
    if needs_reference():
        return reference.attention_tangents(q, k, v)
    return _attention_tangents(q, k, v)
