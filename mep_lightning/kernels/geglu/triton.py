"""The gate of a GEGLU layer on a GPU, in fp32 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches

BLOCK = 1024


@triton.jit
def _geglu_kernel(
    x,  # [rows, 2 C], contiguous
    y,  # [rows, C], contiguous
    C,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < C
    at = x + row * 2 * C + column
    value = tl.load(at, mask=known, other=0.0).to(tl.float32)
    gate = tl.load(at + C, mask=known, other=0.0).to(tl.float32)
    result = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(y + row * C + column, result.to(y.dtype.element_ty), mask=known)


@launches
def geglu(x: Tensor) -> Tensor:
    """As the reference; x on a GPU, contiguous, in fp32, bf16 or fp16, and not empty."""
    channels = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], channels)
    _geglu_kernel[(y.numel() // channels, triton.cdiv(channels, BLOCK))](x, y, channels, BLOCK)
    return y
