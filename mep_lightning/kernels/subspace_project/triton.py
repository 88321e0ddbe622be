"""Projecting directions out of a gradient on a GPU, in one launch: the gradient stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches

LARGEST = 1 << 14  # elements that one program holds
TILE = 1 << 13  # elements of the basis at a time


@triton.jit
def projected(g, basis, k, d, at, ROWS: tl.constexpr):
    """g - P'(P g) for g fp32 [D] in registers, its elements beyond d zero; basis P [k, d], at = 0 .. D-1."""
    out = g
    for start in range(0, k, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < k)[:, None] & (at < d)[None, :]
        p = tl.load(basis + row.to(tl.int64)[:, None] * d + at[None, :], mask=inside, other=0.0)  # [ROWS, D]
        along = tl.sum(p * g[None, :], 1)  # [ROWS]
        out -= tl.sum(p * along[:, None], 0)
    return out


@triton.jit
def _project_kernel(grad, basis, k, d, D: tl.constexpr, ROWS: tl.constexpr):
    at = tl.arange(0, D)
    g = tl.load(grad + at, mask=at < d, other=0.0).to(tl.float32)
    tl.store(grad + at, projected(g, basis, k, d, at, ROWS).to(grad.dtype.element_ty), mask=at < d)


def takes(grad: Tensor, basis: Tensor) -> bool:
    """Whether the launch below holds this gradient: contiguous, not too long, its basis in fp32."""
    return grad.is_contiguous() and grad.numel() <= LARGEST and basis.dtype.itemsize == 4


@launches
def subspace_project_(grad: Tensor, basis: Tensor) -> None:
    """As the reference; `takes(grad, basis)` must hold."""
    k, d = basis.shape
    width = max(16, triton.next_power_of_2(d))
    if k:
        _project_kernel[(1,)](grad, basis.contiguous(), k, d, width, max(1, TILE // width), num_warps=8)
