"""Activations and products together with their derivatives along n directions, one launch on a GPU.

Without Triton the rules of `tangents` do as well: they keep to a CPU's caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.pointwise_tangents import reference
from mep_lightning.kernels.stacks import as_rows, is_channels_last

__all__ = ["activation_tangents", "fuses", "product_tangents"]

FUNCTIONS = ("silu", "gelu")
"""What `activation_tangents` knows; gelu is the exact one."""


@defined_by(reference.activation_tangents)
def activation_tangents(x: Tensor, function: str) -> Tensor:
    """f(x) and f'(x) dx, in fp32 and rounded once.

    Args:
        x: [1 + n, *shape], the value first; any floating dtype.
        function: one of `FUNCTIONS`.

    Returns:
        The same in x's shape and dtype.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"{function} is none of {', '.join(FUNCTIONS)}")
    if fuses(x):
        from mep_lightning.kernels.pointwise_tangents import triton

        return triton.activation_tangents(x, function)
    return reference.activation_tangents(_wide(x), function).to(x.dtype)


@defined_by(reference.product_tangents)
def product_tangents(x: Tensor, y: Tensor) -> Tensor:
    """x y and dx y + x dy, in fp32 and rounded once.

    Args:
        x, y: [1 + n, *shape], values first; of one shape and floating dtype.

    Returns:
        The same.
    """
    if fuses(x, y):
        from mep_lightning.kernels.pointwise_tangents import triton

        return triton.product_tangents(x, y)
    return reference.product_tangents(_wide(x), _wide(y)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fuses(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton answers for stacks: of one shape, dtype and order in memory, with rows that are dense."""
    if not runs_triton(x) or x.dtype.itemsize > 4 or x.numel() == 0 or len(x) < 2 or as_rows(x) is None:
        return False
    order = is_channels_last(x[0])
    return all(
        (one.shape, one.dtype, one.device) == (x.shape, x.dtype, x.device)
        and is_channels_last(one[0]) == order
        and as_rows(one) is not None
        for one in others
    )
