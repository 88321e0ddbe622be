"""Group and layer norms together with their derivatives along n directions: statistics of a value are taken once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.norm_tangents import reference
from mep_lightning.kernels.stacks import room

__all__ = ["group_norm_tangents", "layer_norm_tangents"]

AT_ONCE = {"cpu": 2**19, "cuda": 2**22}
"""Values that PyTorch works on together, in fp32: 2 MiB stay in a CPU's caches; 16 MiB are little memory on a GPU,
where every block is launches more."""


@defined_by(reference.group_norm_tangents)
def group_norm_tangents(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """A group norm of a value, and its derivatives along n directions; statistics in fp32 at least.

    Args:
        x: [1 + n, B, C, *pixels], the value first, any floating dtype.
        groups: how many share the channels.
        weight, bias: [C], of the norm, or None; they do not move.
        eps: added to the variance.

    Returns:
        The same in x's shape and dtype, channels last where the value is.
    """
    if _fused(x):
        from mep_lightning.kernels.norm_tangents import triton

        return triton.group_norm_tangents(x, groups, weight, bias, eps)
    pixels = tuple(range(3 - x.dim(), 0))
    width = x.shape[2] // groups

    def mean(values: Tensor) -> Tensor:
        """[..., B, C, pixels] -> of a group, at each of its channels [..., B, C, 1, ...]."""
        sums = (
            (values.sum(pixels) if pixels else values)
            .unflatten(-1, (-1, width))
            .mean(-1, keepdim=True)
            .div_(math.prod(x.shape[3:]))
        )
        return sums.expand(*sums.shape[:-1], width).flatten(-2)[(..., *(None for _ in pixels))]

    def by_channel(parameter: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * groups if parameter is None else parameter.view(-1, *(1 for _ in pixels)).split(together)

    out = room(x[0], len(x) - 1)
    together = max(_at_once(x) // max(x[0].numel() // groups, 1), 1) * width
    parts = zip(x.split(together, 2), out.split(together, 2), strict=True)
    for (source, target), gain, shift in zip(parts, by_channel(weight), by_channel(bias), strict=False):
        _normed_(source, target, mean, gain, shift, eps)
    return out


@defined_by(reference.layer_norm_tangents)
def layer_norm_tangents(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As `group_norm_tangents`, over the last dimensions.

    Args:
        x: [1 + n, ..., *shape], the value first.
        shape: of what is normed together.
        weight, bias: of that shape, or None.
        eps: added to the variance.

    Returns:
        The same in x's shape and dtype, contiguous.
    """
    if _fused(x) and len(shape) == 1:
        from mep_lightning.kernels.norm_tangents import triton

        return triton.layer_norm_tangents(x, weight, bias, eps)
    dims = tuple(range(-len(shape), 0))
    rows = x.reshape(len(x), -1, *shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for source, target in _blocks(rows, out, max(_at_once(rows) // max(math.prod(shape), 1), 1)):
        _normed_(source, target, lambda values: values.mean(dims, keepdim=True), weight, bias, eps)
    return out.view(x.shape)


def _fused(x: Tensor) -> bool:
    """Whether Triton answers."""
    return runs_triton(x) and x.dtype.itemsize <= 4 and x.numel() > 0 and len(x) > 1


def _at_once(x: Tensor) -> int:
    return AT_ONCE.get(x.device.type, AT_ONCE["cpu"])


def _blocks(source: Tensor, target: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(source.split(count, 1), target.split(count, 1), strict=True)


def _normed_(
    source: Tensor,
    target: Tensor,
    mean: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Write what a norm makes of values and tangents, whose means are told, where it goes."""
    wide = torch.promote_types(source.dtype, torch.float32)
    gain = None if weight is None else weight.to(wide)
    value = source[0].to(wide)
    normal = value - mean(value)
    spread = (mean(normal * normal) + eps).rsqrt_()
    normal.mul_(spread)
    spread = spread if gain is None else spread * gain
    for move, place in zip(source[1:], target[1:], strict=True):
        move = move.to(wide)
        share = mean(move * normal)
        place.copy_(torch.addcmul(move, normal, share, value=-1).sub_(mean(move)).mul_(spread))
    if gain is not None:
        normal.mul_(gain)
    target[0].copy_(normal if bias is None else normal.add_(bias.to(wide)))
