"""int8 back to floating point on a GPU: each number is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches

TILE = 4096
"""Numbers that a program has in hand."""
LONGEST = 2048
"""Of a row."""


@triton.jit
def _dequantize_kernel(
    q,  # int8 [outputs, K], dense
    scale,  # fp32 [outputs]
    w,  # [outputs, K], likewise
    outputs,
    K,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < outputs) & (column[None, :] < K)
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    factor = tl.load(scale + row, mask=row < outputs, other=0.0)
    values = tl.load(q + at, mask=inside, other=0).to(tl.float32) * factor[:, None]
    tl.store(w + at, values.to(w.dtype.element_ty), mask=inside)


@launches
def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As the reference, in q's memory format, whose rows must follow one another densely."""
    weight = torch.empty_like(q, dtype=dtype)
    outputs, length = len(q), q[0].numel()
    block = min(triton.next_power_of_2(length), LONGEST)
    rows = max(TILE // block, 1)
    grid = (triton.cdiv(outputs, rows), triton.cdiv(length, block))
    _dequantize_kernel[grid](q, scale.contiguous(), weight, outputs, length, rows, block)
    return weight
