"""The int8 linear on a GPU: tiles of the weight become floating point in registers, never in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.tiling import GROUP, WIDE, milliseconds, place_of_tile, tiles


@triton.autotune(configs=tiles(), key=["M", "N", "K"], do_bench=milliseconds, cache_results=True)
@triton.jit
def _linear_kernel(
    x,  # [M, K]
    q,  # int8 [N, K]
    scale,  # fp32 [N]
    bias,  # [N]
    row_scale,  # fp32 [M], of an int8 x
    y,  # [M, N]
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = place_of_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_at = x + row[:, None] * K + depth[None, :]
    q_at = q + column[None, :] * K + depth[:, None]
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    ARITHMETIC: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        x_tile = tl.load(x_at, mask=(row[:, None] < M) & inside[None, :], other=0)
        q_tile = tl.load(q_at, mask=(column[None, :] < N) & inside[:, None], other=0)
        if INTEGER:
            total = tl.dot(x_tile, q_tile, total, out_dtype=tl.int32)
        else:
            total = tl.dot(x_tile.to(ARITHMETIC), q_tile.to(ARITHMETIC), total, input_precision="ieee")
        x_at += BLOCK_K
        q_at += BLOCK_K
    values = total.to(tl.float32) * tl.load(scale + column, mask=column < N, other=0.0)[None, :]
    if INTEGER:
        values *= tl.load(row_scale + row, mask=row < M, other=0.0)[:, None]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = y + row[:, None] * N + column[None, :]
    tl.store(at, values.to(y.dtype.element_ty), mask=(row[:, None] < M) & (column[None, :] < N))


@launches
def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference. x [..., K] in fp32, bf16 or fp16; q [N, K] int8, scale [N], bias [N] -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [M, K]
    return _launch(rows, q, scale, bias, None, x.dtype).view(*x.shape[:-1], q.shape[0])


@launches
def int8_linear_w8a8(
    x: Tensor, row_scale: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x int8 [M, K] with row_scale [M], on int8 tensor cores with exact int32 sums -> [M, N] in `dtype`."""
    return _launch(x.contiguous(), q, scale, bias, row_scale, dtype)


def _launch(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (m, k), n = x.shape, q.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),)

    if y.numel():
        _linear_kernel[grid](x, q.contiguous(), scale, bias, row_scale, y, m, n, k, bias is not None, WIDE, GROUP)
    return y
