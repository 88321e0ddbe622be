"""Norms and their tangents: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_norm_tangents(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """y = w z + b, z = (x - m) / s; dy = w / s (dx - mean(dx) - z mean(z dx)), over the pixels of a group of channels.

    x [1 + n, B, C, *pixels], the value first -> [1 + n, B, C, *pixels].
    """
    grouped = x.reshape(*x.shape[:2], groups, -1)
    normed = _normed(grouped, (-1,), eps).reshape(x.shape)
    return _scaled(normed, *(None if p is None else p.view(-1, *(1 for _ in x.shape[3:])) for p in (weight, bias)))


def layer_norm_tangents(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As `group_norm_tangents`, over the last dimensions, of this shape: x [1 + n, ..., *shape] -> the same."""
    return _scaled(_normed(x, tuple(range(-len(shape), 0)), eps), weight, bias)


def _normed(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    value, moves = x[:1], x[1:]
    centred = value - value.mean(dims, keepdim=True)
    slope = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    z = centred * slope
    along = slope * (moves - moves.mean(dims, keepdim=True) - z * (z * moves).mean(dims, keepdim=True))
    return torch.cat([z, along])


def _scaled(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else torch.cat([normed[:1] + bias, normed[1:]])
