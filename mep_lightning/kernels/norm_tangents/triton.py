"""Norms on a GPU, with tangents or without.

A group norm in two launches: sums over chunks of a group's pixels, and what is made of them. A value's sums are of what
it is above the group's first number, so that a large mean does not drown a small spread in fp32. A layer norm's row
stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.stacks import room

TILE = 4096
"""Numbers that a program has in hand, of a value and of a tangent each."""
CHUNKS = 64
"""Programs that share a group, at most."""


@triton.jit
def _sums_kernel(
    x,  # [1 + n, B, C, P]
    sums,  # fp32 [max(n, 1), B * groups, chunks, 4]
    groups,
    width,
    pixels,
    span,
    x_n,
    x_b,
    x_c,
    x_p,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CARRIES: tl.constexpr,
):
    """Sums of x - a, its square, dx and (x - a) dx over a chunk of a group; a is the group's first number."""
    chunk, which, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    base = x + b * x_b + g * width * x_c
    channel, place = tl.arange(0, WIDTH).to(tl.int64), tl.arange(0, BLOCK)
    first = tl.load(base).to(tl.float32)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    square = tl.zeros((BLOCK, WIDTH), tl.float32)
    moved = tl.zeros((BLOCK, WIDTH), tl.float32)
    both = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, span, BLOCK):
        pixel = (chunk * span + start + place).to(tl.int64)
        at = base + pixel[:, None] * x_p + channel[None, :] * x_c
        inside = (start + place[:, None] < span) & (pixel[:, None] < pixels) & (channel[None, :] < width)
        value = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(tl.float32) - first, 0.0)
        total += value
        square += value * value
        if CARRIES:
            move = tl.load(at + (i + 1).to(tl.int64) * x_n, mask=inside, other=0.0).to(tl.float32)
            moved += move
            both += value * move
    at = sums + ((i * tl.num_programs(1) + which) * tl.num_programs(0) + chunk) * 4
    tl.store(at, tl.sum(tl.sum(total, 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(square, 1), 0))
    if CARRIES:
        tl.store(at + 2, tl.sum(tl.sum(moved, 1), 0))
        tl.store(at + 3, tl.sum(tl.sum(both, 1), 0))


@triton.jit
def _group_kernel(
    x,
    sums,
    out,  # [1 + n, B, C, P]
    weight,
    bias,
    eps,
    groups,
    width,
    pixels,
    span,
    x_n,
    x_b,
    x_c,
    x_p,
    out_n,
    out_b,
    out_c,
    out_p,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CARRIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A chunk of a group: the tangent of a direction, and by the first direction's programs the value."""
    chunk, which, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    base = x + b * x_b + g * width * x_c
    target = out + b * out_b + g * width * out_c
    number = tl.arange(0, CHUNKS)
    there = number < tl.num_programs(0)
    told = sums + ((i * tl.num_programs(1) + which) * tl.num_programs(0) + number) * 4
    count = width * pixels * 1.0
    total = tl.sum(tl.load(told, mask=there, other=0.0), 0) / count
    square = tl.sum(tl.load(told + 1, mask=there, other=0.0), 0) / count
    mean = tl.load(base).to(tl.float32) + total
    slope = 1.0 / tl.sqrt(tl.maximum(square - total * total, 0.0) + eps)
    if CARRIES:
        moved = tl.sum(tl.load(told + 2, mask=there, other=0.0), 0) / count
        both = tl.sum(tl.load(told + 3, mask=there, other=0.0), 0) / count
        share = (both - total * moved) * slope  # mean(z dx)
    channel, place = tl.arange(0, WIDTH).to(tl.int64), tl.arange(0, BLOCK)
    known = channel < width
    gain = tl.full((WIDTH,), 1.0, tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + g * width + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.zeros((WIDTH,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + g * width + channel, mask=known, other=0.0).to(tl.float32)
    for start in range(0, span, BLOCK):
        pixel = (chunk * span + start + place).to(tl.int64)
        inside = (start + place[:, None] < span) & (pixel[:, None] < pixels) & known[None, :]
        at = base + pixel[:, None] * x_p + channel[None, :] * x_c
        to = target + pixel[:, None] * out_p + channel[None, :] * out_c
        normal = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean) * slope
        if CARRIES:
            move = tl.load(at + (i + 1).to(tl.int64) * x_n, mask=inside, other=0.0).to(tl.float32)
            along = (move - moved - normal * share) * slope * gain[None, :]
            tl.store(to + (i + 1).to(tl.int64) * out_n, along.to(out.dtype.element_ty), mask=inside)
        if i == 0:
            tl.store(to, (normal * gain[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _layer_kernel(
    x,  # [1 + n, rows, C], rows dense
    out,
    weight,
    bias,
    eps,
    C,
    x_n,
    x_row,
    out_n,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    known = column < C
    at, to = x + row * x_row + column, out + row * C + column
    value = tl.load(at, mask=known, other=0.0).to(tl.float32)
    centred = tl.where(known, value - tl.sum(value, 0) / C, 0.0)
    slope = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    normal = centred * slope
    move = tl.load(at + (i + 1).to(tl.int64) * x_n, mask=known, other=0.0).to(tl.float32)
    along = (move - tl.sum(move, 0) / C - normal * (tl.sum(normal * move, 0) / C)) * slope
    if HAS_WEIGHT:
        gain = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
        along *= gain
        normal *= gain
    if HAS_BIAS:
        normal += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    tl.store(to + (i + 1).to(tl.int64) * out_n, along.to(out.dtype.element_ty), mask=known)
    if i == 0:
        tl.store(to, normal.to(out.dtype.element_ty), mask=known)


@launches
def group_norm_tangents(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As the reference; x on a GPU, in fp32, bf16 or fp16, and not empty."""
    out = room(x[0], len(x) - 1)
    source, target = _images(x), _images(out)
    count, batch, channels, pixels = source.shape
    width = channels // groups
    padded = triton.next_power_of_2(width)
    block = max(1, min(TILE // padded, triton.next_power_of_2(pixels)))
    span = triton.cdiv(triton.cdiv(pixels, block), CHUNKS) * block
    grid = (triton.cdiv(pixels, span), batch * groups, max(count - 1, 1))
    sums = torch.empty(grid[2], grid[1], grid[0], 4, device=x.device, dtype=torch.float32)
    sizes = (groups, width, pixels, span)
    parameters, given = _pointers(x, weight, bias)
    _sums_kernel[grid](source, sums, *sizes, *source.stride(), block, padded, count > 1)
    _group_kernel[grid](
        source,
        sums,
        target,
        *parameters,
        eps,
        *sizes,
        *source.stride(),
        *target.stride(),
        block,
        padded,
        triton.next_power_of_2(grid[0]),
        count > 1,
        *given,
    )
    return out


def _pointers(x: Tensor, *parameters: Tensor | None) -> tuple[list[Tensor], list[bool]]:
    """What a kernel is given of parameters, anything where there is none, and whether there is one."""
    return [x if one is None else one.contiguous() for one in parameters], [one is not None for one in parameters]


def _images(x: Tensor) -> Tensor:
    """[1 + n, B, C, pixels], a view where pixels follow one another evenly, as they do in either memory format."""
    if x.dim() == 3:
        return x[..., None]
    try:
        return x.view(*x.shape[:3], -1)
    except RuntimeError:
        return x.flatten(3)


@launches
def layer_norm_tangents(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As the reference of one dimension; x as for `group_norm_tangents`, with tangents."""
    length = x.shape[-1]
    rows = x.reshape(len(x), -1, length)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(length)
    parameters, given = _pointers(x, weight, bias)
    _layer_kernel[(rows.shape[1], len(x) - 1)](
        rows,
        out,
        *parameters,
        eps,
        length,
        rows.stride(0),
        rows.stride(1),
        out.stride(0),
        block,
        *given,
        num_warps=4 if block <= 2048 else 8,
    )
    return out.view(x.shape)
