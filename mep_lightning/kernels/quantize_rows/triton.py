"""Symmetric int8 on a GPU: a program a row, which it reads twice (the second time from L2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches

BLOCK = 1024
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds fp32 to an integer, halves to even


@triton.jit
def _quantize_rows_kernel(x, q, scale, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    broken = tl.zeros((BLOCK,), dtype=tl.int32)  # a maximum leaves NaN out
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32)
        largest, broken = tl.maximum(largest, tl.abs(value)), broken | (value != value).to(tl.int32)
    step = tl.div_rn(tl.max(largest, 0), 127.0)
    step = tl.where(step == 0, 1.0, step)
    step = tl.where(tl.max(broken, 0) > 0, float("nan"), step)
    tl.store(scale + tl.program_id(0), step)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32)
        rounded = (tl.div_rn(value, tl.zeros_like(value) + step) + ROUNDING) - ROUNDING
        tl.store(q + row + at, tl.clamp(rounded, -127.0, 127.0).to(tl.int8), mask=at < size)


@launches
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; x [O, ...] in fp32, bf16 or fp16, not empty."""
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()  # rows must be dense; in which order their elements lie does not matter
    q, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
    _quantize_rows_kernel[(x.shape[0],)](x, q, scale, x[0].numel(), BLOCK)
    return q, scale
