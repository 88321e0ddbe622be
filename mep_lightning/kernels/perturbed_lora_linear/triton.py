"""The perturbed LoRA linear on a GPU: members' directions are made in registers, tile by tile.

Two launches: h_v = x_v A_v', narrow; then the int8 product, to whose tiles h_v B_v' is added before they are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.perturbed_lora_linear.reference import Probe
from mep_lightning.kernels.philox.triton import normals
from mep_lightning.kernels.tiling import GROUP, WIDE, milliseconds, place_of_tile, tiles

ROWS = 64  # of a member, a program of the first launch
DEPTH = 64  # of its inner dimension at a time
LARGEST = 64 * 64  # outputs of the second launch's tiles: all larger ones take a compiler minutes with r = 128
WIDEST = 256  # of ranks, for whose tiles a consumer's GPU has the shared memory


def stages(width: int) -> int:
    """How many tiles of A, of a rank's width, the first launch has on their way at once: 99 KiB of them at most."""
    return 3 if width <= 64 else 2 if width <= 128 else 1


def takes(a: Tensor) -> bool:
    """Whether the launches below hold factors of this rank."""
    return len(a) <= WIDEST


@triton.jit
def moved_tile(
    factor,
    row,
    column,
    rows,
    columns,
    member,
    amount,
    seed,
    step,
    param_id,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """factor[row : row + HEIGHT, column : column + WIDTH] + amount * e, fp32; row-major [rows, columns], zero outside.

    WIDTH and column are multiples of 4. Where `columns` is one too (ALIGNED), a tile's rows begin on blocks of four
    normals; elsewhere every element draws its own block and takes its word of it.
    """
    r = (row + tl.arange(0, HEIGHT)).to(tl.int64)
    c = column + tl.arange(0, WIDTH)
    at = r[:, None] * columns + c[None, :]
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    values = tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
    if amount != 0.0:
        if ALIGNED:
            block = r[:, None] * (columns // 4) + (column // 4 + tl.arange(0, WIDTH // 4))[None, :]
            n0, n1, n2, n3 = normals(seed, block, step, member, param_id)
            noise = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (HEIGHT, WIDTH))
        else:
            n0, n1, n2, n3 = normals(seed, at // 4, step, member, param_id)
            word = at % 4
            noise = tl.where(word == 0, n0, tl.where(word == 1, n1, tl.where(word == 2, n2, n3)))
        values += tl.where(inside, amount * noise, 0.0)
    return values


@triton.jit(do_not_specialize=["seed", "step", "param_id", "N"])
def _down_kernel(
    x,  # [V * N, K]
    a,  # [R, K]
    h,  # fp32 [V * N, R]
    directions,  # int64 [V]
    amounts,  # fp32 [V]: sign * mu
    seed,
    step,
    param_id,
    N,
    K,
    R,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    member = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = member.to(tl.int64) * N + row
    direction, amount = tl.load(directions + member), tl.load(amounts + member)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = (row[:, None] < N) & (depth[None, :] < K)
        x_tile = tl.load(x + at[:, None] * K + depth[None, :], mask=inside, other=0.0).to(tl.float32)
        a_tile = moved_tile(a, 0, start, R, K, direction, amount, seed, step, param_id, RANK, DEPTH, ALIGNED)
        total = tl.dot(x_tile, tl.trans(a_tile), total, input_precision="ieee")
    rank = tl.arange(0, RANK)
    tl.store(h + at[:, None] * R + rank[None, :], total, mask=(row[:, None] < N) & (rank[None, :] < R))


@triton.autotune(configs=tiles(LARGEST), key=["M", "N", "K", "RANK"], do_bench=milliseconds, cache_results=True)
@triton.jit(do_not_specialize=["seed", "step", "param_id", "M"])
def _up_kernel(
    x,  # [V * M, K]
    q,  # int8 [N, K]
    scale,  # fp32 [N]
    bias,  # [N]
    h,  # fp32 [V * M, R]
    b,  # [N, R]
    y,  # [V * M, N]
    directions,  # int64 [V]
    amounts,  # fp32 [V]
    scaling,
    seed,
    step,
    param_id,
    M,
    N,
    K,
    R,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = place_of_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    member = tl.program_id(1)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    at = member.to(tl.int64) * M + row
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_at = x + at[:, None] * K + depth[None, :]
    q_at = q + column[None, :] * K + depth[:, None]
    ARITHMETIC: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        x_tile = tl.load(x_at, mask=(row[:, None] < M) & inside[None, :], other=0)
        q_tile = tl.load(q_at, mask=(column[None, :] < N) & inside[:, None], other=0)
        total = tl.dot(x_tile.to(ARITHMETIC), q_tile.to(ARITHMETIC), total, input_precision="ieee")
        x_at += BLOCK_K
        q_at += BLOCK_K
    values = total * tl.load(scale + column, mask=column < N, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    rank = tl.arange(0, RANK)
    inside = (row[:, None] < M) & (rank[None, :] < R)
    h_tile = tl.load(h + at[:, None] * R + rank[None, :], mask=inside, other=0.0)
    direction, amount = tl.load(directions + member), tl.load(amounts + member)
    b_tile = moved_tile(b, tile_n * BLOCK_N, 0, N, R, direction, amount, seed, step, param_id, BLOCK_N, RANK, ALIGNED)
    values += scaling * tl.dot(h_tile, tl.trans(b_tile), input_precision="ieee")
    tl.store(
        y + at[:, None] * N + column[None, :],
        values.to(y.dtype.element_ty),
        mask=(row[:, None] < M) & (column[None, :] < N),
    )


@launches
def perturbed_lora_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    probes: list[Probe],
    mu: float,
    seed: int,
    step: int,
    param_ids: tuple[int, int],
) -> Tensor:
    """As the reference; `takes(a)` must hold. x [V * N, ..., K] in fp32, bf16 or fp16 -> [..., O]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    members, (outputs, inputs), rank = len(probes), q.shape, len(a)
    each = len(rows) // members
    directions = torch.tensor([i for i, _ in probes], device=x.device)
    amounts = torch.tensor([sign * mu for _, sign in probes], dtype=torch.float32, device=x.device)
    h = torch.empty(len(rows), rank, dtype=torch.float32, device=x.device)
    y = torch.empty(len(rows), outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y.view(*x.shape[:-1], outputs)
    wide = max(16, triton.next_power_of_2(rank))
    down = (triton.cdiv(each, ROWS), members)
    common, sizes = (directions, amounts), (each, inputs, rank)
    aligned = [width % 4 == 0 for width in (inputs, rank)]
    _down_kernel[down](
        rows,
        a.contiguous(),
        h,
        *common,
        seed,
        step,
        param_ids[0],
        *sizes,
        ROWS,
        wide,
        DEPTH,
        aligned[0],
        num_stages=stages(wide),
    )

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(each, tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]), members

    _up_kernel[grid](
        rows,
        q.contiguous(),
        scale,
        bias,
        h,
        b.contiguous(),
        y,
        *common,
        scaling,
        seed,
        step,
        param_ids[1],
        each,
        outputs,
        inputs,
        rank,
        bias is not None,
        wide,
        aligned[1],
        WIDE,
        GROUP,
    )
    return y.view(*x.shape[:-1], outputs)
