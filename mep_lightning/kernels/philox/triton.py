"""Philox on a GPU: the definition's integers, and its normals but for the rounding of a logarithm and a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches

BLOCKS = 256  # blocks of four elements a program


@triton.jit
def normals(seed, block, step, member, param_id):
    """The four normals of every block, in registers. block int64 [N]; the rest scalars -> four fp32 [N]."""
    zero = tl.zeros_like(block)
    c1, c2, c3 = (zero + step).to(tl.uint32), (zero + member).to(tl.uint32), (zero + param_id).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), c1, c2, c3)
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    return n0, n1, n2, n3


@triton.jit
def normal_elements(seed, first_block, step, member, param_id, BLOCKS: tl.constexpr):
    """The normals of BLOCKS consecutive blocks in the order of their elements -> fp32 [4 * BLOCKS]."""
    n0, n1, n2, n3 = normals(seed, first_block + tl.arange(0, BLOCKS), step, member, param_id)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * BLOCKS,))


@triton.jit(do_not_specialize=["seed", "step", "first_member", "param_id", "numel"])
def _normal_kernel(out, seed, step, first_member, param_id, numel, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    row = tl.program_id(1).to(tl.int64)
    values = normal_elements(seed, first, step, first_member + row, param_id, BLOCKS)
    at = first * 4 + tl.arange(0, 4 * BLOCKS)
    tl.store(out + row * numel + at, values, mask=at < numel)


@launches
def philox_normal(seed: int, step: int, members: Sequence[int], param_id: int, out: Tensor) -> None:
    """Fill `out`, fp32 [M, numel] and contiguous, in place; a launch for every run of consecutive members."""
    numel = out.shape[1]
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(members), 1) if b != a + 1), len(members)]
    for start, stop in pairwise(starts):
        if numel and stop > start:
            grid = (triton.cdiv(numel, 4 * BLOCKS), stop - start)
            _normal_kernel[grid](out[start], seed, step, members[start], param_id, numel, BLOCKS)
