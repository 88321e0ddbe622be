"""Symmetric int8 with one scale a row: of a weight's output channels, or of activations for int8 products."""

from __future__ import annotations

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, needs_reference, runs_triton
from mep_lightning.kernels.quantize_rows import reference

__all__ = ["quantize_rows"]


@torch.library.custom_op("mep_lightning::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(x) and x.dtype.itemsize <= 4 and x.numel():
        from mep_lightning.kernels.quantize_rows import triton

        return triton.quantize_rows(x)
    return reference.quantize_rows(x)


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@defined_by(reference.quantize_rows)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise by the largest magnitude of each row; the error is at most half a scale.

    Args:
        x: [O, ...], any floating dtype; the arithmetic is fp32. No gradient flows through.

    Returns:
        q int8 [O, ...] in [-127, 127], scale fp32 [O] (1 for a row of zeros), with x ~ q * scale.

    Raises:
        NotImplementedError: forward-mode AD asks for a derivative; rounding has none, and a silent zero would be wrong.
    """
    if needs_reference():
        raise NotImplementedError("quantize_rows rounds and has no derivative: quantise beforehand")
    return _quantize_rows(x.detach())
