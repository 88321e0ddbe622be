"""The int8 convolution on a GPU as an implicit matrix product, channels last: no patches and no weight in memory.

Rows are output pixels, columns output channels, the depth runs over the kernel's taps and input channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.tiling import GROUP, WIDE, milliseconds, place_of_tile, tiles


@triton.autotune(configs=tiles(), key=["B", "OH", "OW", "N", "C"], do_bench=milliseconds, cache_results=True)
@triton.jit
def _conv_kernel(
    x,  # [B, H, W, C]
    q,  # int8 [N, KH, KW, C]
    scale,  # fp32 [N]
    bias,  # [N]
    y,  # [B, OH, OW, N]
    B,
    H,
    W,
    C,
    N,
    OH,
    OW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    M = B * OH * OW
    tile_m, tile_n = place_of_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, oy, ox = (row // (OH * OW)).to(tl.int64), row // OW % OH, row % OW
    depth = tl.arange(0, BLOCK_K)
    ARITHMETIC: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(KH * KW):
        iy, ix = oy * STRIDE_H - PAD_H + tap // KW, ox * STRIDE_W - PAD_W + tap % KW
        seen = (row < M) & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        x_at = x + ((image * H + iy) * W + ix)[:, None] * C + depth[None, :]
        q_at = q + (column.to(tl.int64) * KH * KW + tap)[None, :] * C + depth[:, None]
        for start in range(0, C, BLOCK_K):
            inside = depth < C - start
            x_tile = tl.load(x_at + start, mask=seen[:, None] & inside[None, :], other=0)
            q_tile = tl.load(q_at + start, mask=(column < N)[None, :] & inside[:, None], other=0)
            total = tl.dot(x_tile.to(ARITHMETIC), q_tile.to(ARITHMETIC), total, input_precision="ieee")
    values = total * tl.load(scale + column, mask=column < N, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = y + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, values.to(y.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@launches
def int8_conv2d(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """As the reference, in channels-last memory; x and q in another memory format are rearranged first."""
    batch, channels, height, width = x.shape
    outputs, _, kh, kw = q.shape
    oh = (height + 2 * padding[0] - kh) // stride[0] + 1
    ow = (width + 2 * padding[1] - kw) // stride[1] + 1
    last = torch.channels_last
    y = torch.empty(batch, outputs, oh, ow, dtype=x.dtype, device=x.device, memory_format=last)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(batch * oh * ow, tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)

    sizes = (batch, height, width, channels, outputs, oh, ow)
    if y.numel():
        _conv_kernel[grid](
            x.contiguous(memory_format=last),
            q.contiguous(memory_format=last),
            scale,
            bias,
            y,
            *sizes,
            kh,
            kw,
            *stride,
            *padding,
            bias is not None,
            WIDE,
            GROUP,
        )
    return y
