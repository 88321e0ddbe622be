"""Attention and its tangents on a GPU in one pass over the keys, as flash attention's: no row of scores is ever whole.

With p and x = p dS as yet unnormalised, running sums l of p, r of x, o of p v and t of p dv + x v follow the running
maximum alike; at the end O = o / l and dO = t / l - r / l O.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.tiling import WIDE

WIDEST = 256
"""Head widths beyond which a tile leaves the registers."""
TILES = {16: (64, 64, 3, 4), 32: (64, 64, 3, 4), 64: (128, 64, 2, 8), 128: (128, 32, 2, 8), 256: (32, 32, 1, 8)}
"""Queries, keys, stages and warps of a tile by the heads' width, in half precision.

Four of keys and values lie in shared memory, of which a consumer's GPU has 99 KiB. Read once on an H100, fp16, a stack
of three: 4,096 queries of 40 take 1.17 ms (1.51 in tiles of 64), 1,024 of 80 .09 ms (.28 in tiles of 64 by 32).
"""
TILES_FP32 = {16: (32, 32, 3, 4), 32: (32, 32, 3, 4), 64: (32, 32, 2, 4), 128: (32, 16, 1, 8), 256: (16, 16, 1, 8)}
"""Those of fp32, which takes twice the room."""


@triton.jit
def _attention_tangents_kernel(
    q,  # [1 + n, B, H, S, D], D consecutive
    k,  # [1 + n, B, H, T, D]
    v,  # [1 + n, B, H, T, D]
    out,  # [1 + n, B, S, H, D], contiguous
    root,  # 1 / sqrt(D)
    B,
    H,
    S,
    T,
    D,
    q_n,
    q_b,
    q_h,
    q_s,
    k_n,
    k_b,
    k_h,
    k_t,
    v_n,
    v_b,
    v_h,
    v_t,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i = (tl.program_id(2) + 1).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    column, depth = tl.arange(0, BLOCK_T), tl.arange(0, WIDTH)
    ARITHMETIC: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    q_at = q + b * q_b + h * q_h + row[:, None] * q_s + depth[None, :]
    q_in = (row[:, None] < S) & (depth[None, :] < D)
    q0 = tl.load(q_at, mask=q_in, other=0.0).to(ARITHMETIC)
    dq = tl.load(q_at + i * q_n, mask=q_in, other=0.0).to(ARITHMETIC)
    k_at = k + b * k_b + h * k_h + depth[:, None]
    v_at = v + b * v_b + h * v_h + depth[None, :]
    highest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    moved = tl.zeros((BLOCK_S,), tl.float32)
    o = tl.zeros((BLOCK_S, WIDTH), tl.float32)
    t = tl.zeros((BLOCK_S, WIDTH), tl.float32)
    level = tl.zeros((BLOCK_S,), tl.float32)  # of the slopes, which a softmax does not see: x is small without it
    for start in range(0, T, BLOCK_T):
        key = (start + column).to(tl.int64)
        k_in = (depth[:, None] < D) & (key[None, :] < T)
        k0 = tl.load(k_at + key[None, :] * k_t, mask=k_in, other=0.0).to(ARITHMETIC)  # [WIDTH, BLOCK_T]
        dk = tl.load(k_at + i * k_n + key[None, :] * k_t, mask=k_in, other=0.0).to(ARITHMETIC)
        scores = tl.dot(q0, k0, input_precision="ieee") * root
        slopes = tl.dot(q0, dk, tl.dot(dq, k0, input_precision="ieee"), input_precision="ieee") * root
        scores = tl.where(key[None, :] < T, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        fade = tl.exp(highest - higher)
        p = tl.exp(scores - higher[:, None])
        if start == 0:
            level = tl.sum(p * slopes, 1) / tl.sum(p, 1)
        x = (p * (slopes - level[:, None])).to(ARITHMETIC)
        total = total * fade + tl.sum(p, 1)
        moved = moved * fade + tl.sum(x.to(tl.float32), 1)  # of what is multiplied below, rounding included
        v_in = (key[:, None] < T) & (depth[None, :] < D)
        v0 = tl.load(v_at + key[:, None] * v_t, mask=v_in, other=0.0).to(ARITHMETIC)  # [BLOCK_T, WIDTH]
        dv = tl.load(v_at + i * v_n + key[:, None] * v_t, mask=v_in, other=0.0).to(ARITHMETIC)
        p = p.to(ARITHMETIC)
        o = tl.dot(p, v0, o * fade[:, None], input_precision="ieee")
        t = tl.dot(p, dv, t * fade[:, None], input_precision="ieee")
        t = tl.dot(x, v0, t, input_precision="ieee")
        highest = higher
    o = o / total[:, None]
    t = t / total[:, None] - (moved / total)[:, None] * o
    at = out + (b * S + row[:, None]) * H * D + h * D + depth[None, :]
    tl.store(at + i * B * S * H * D, t.to(out.dtype.element_ty), mask=q_in)
    if tl.program_id(2) == 0:
        tl.store(at, o.to(out.dtype.element_ty), mask=q_in)


def tile(width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries, keys, stages and warps for heads of a width."""
    return (TILES if dtype.itemsize < 4 else TILES_FP32)[width]


def takes(q: Tensor) -> bool:
    """Whether the kernel computes in this dtype and heads of this width."""
    return q.dtype.itemsize <= 4 and q.shape[-1] <= WIDEST and q.shape[0] > 1


@launches
def attention_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the reference; `takes(q)` must hold."""
    count, batch, heads, queries, depth = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(count, batch, queries, heads, depth, dtype=q.dtype, device=q.device)
    width = max(16, triton.next_power_of_2(depth))
    block_s, block_t, stages, warps = tile(width, q.dtype)
    grid = (triton.cdiv(queries, block_s), batch * heads, count - 1)
    if out.numel():
        _attention_tangents_kernel[grid](
            q,
            k,
            v,
            out,
            1 / math.sqrt(depth),
            batch,
            heads,
            queries,
            k.shape[-2],
            depth,
            *q.stride()[:4],
            *k.stride()[:4],
            *v.stride()[:4],
            width,
            block_s,
            block_t,
            WIDE,
            num_warps=warps,
            num_stages=stages,
        )
    return out.transpose(2, 3)
