"""Activations and products with their tangents on a GPU: every number is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.stacks import as_rows, room

BLOCK = 1024


@triton.jit
def _activation_kernel(
    x,  # [1 + n, rows, C], rows dense
    y,  # contiguous
    C,
    tangents,
    x_n,
    x_row,
    y_n,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK)
    row, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    known = column < C
    at, to = x + row * x_row + column, y + row * C + column
    value = tl.load(at, mask=known, other=0.0).to(tl.float32)
    if GELU:
        share = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        result = value * share
        slope = share + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
    else:
        gate = 1.0 / (1.0 + tl.exp(-value))
        result = value * gate
        slope = gate * (1.0 + value * (1.0 - gate))
    tl.store(to, result.to(y.dtype.element_ty), mask=known)
    for _ in range(tangents):
        at += x_n
        to += y_n
        move = tl.load(at, mask=known, other=0.0).to(tl.float32)
        tl.store(to, (slope * move).to(y.dtype.element_ty), mask=known)


@triton.jit
def _product_kernel(
    x,  # [1 + n, rows, C], rows dense
    y,  # likewise
    z,  # contiguous
    C,
    tangents,
    x_n,
    x_row,
    y_n,
    y_row,
    z_n,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK)
    row, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    known = column < C
    x_at, y_at, to = x + row * x_row + column, y + row * y_row + column, z + row * C + column
    a = tl.load(x_at, mask=known, other=0.0).to(tl.float32)
    b = tl.load(y_at, mask=known, other=0.0).to(tl.float32)
    tl.store(to, (a * b).to(z.dtype.element_ty), mask=known)
    for _ in range(tangents):
        x_at += x_n
        y_at += y_n
        to += z_n
        da = tl.load(x_at, mask=known, other=0.0).to(tl.float32)
        db = tl.load(y_at, mask=known, other=0.0).to(tl.float32)
        tl.store(to, (da * b + a * db).to(z.dtype.element_ty), mask=known)


@launches
def activation_tangents(x: Tensor, function: str) -> Tensor:
    """As the reference; `fuses(x)` must hold."""
    out = room(x[0], len(x) - 1)
    (source,), length = _alike(x)
    grid = (triton.cdiv(length, BLOCK) * source.shape[1],)
    _activation_kernel[grid](
        source, out, length, len(x) - 1, source.stride(0), source.stride(1), out.stride(0), function == "gelu", BLOCK
    )
    return out


@launches
def product_tangents(x: Tensor, y: Tensor) -> Tensor:
    """As the reference; `fuses(x, y)` must hold."""
    out = room(x[0], len(x) - 1)
    (a, b), length = _alike(x, y)
    grid = (triton.cdiv(length, BLOCK) * a.shape[1],)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1), out.stride(0))
    _product_kernel[grid](a, b, out, length, len(x) - 1, *strides, BLOCK)
    return out


def _alike(*stacks: Tensor) -> tuple[list[Tensor], int]:
    """Stacks in rows of one length, the longest that all of them have, and that length."""
    rows = [found for stack in stacks if (found := as_rows(stack)) is not None]
    length = min(one.shape[-1] for one in rows)
    return [one.reshape(len(one), -1, length) for one in rows], length
