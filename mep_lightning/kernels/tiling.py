"""Tile sizes for the matrix products among the Triton kernels, and what they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from triton import knobs

CANDIDATES = (  # rows, columns, depth, warps, stages
    (16, 64, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 32, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
)
LAUNCHES = 8
"""That an autotuner times together."""
CYCLES = 2_000_000_000
"""Of a GPU in a second, at most about so many."""
GROUP = 8  # tiles of rows that share their columns in L2
WIDE = knobs.runtime.interpret  # the interpreter multiplies bf16's bits: it is given fp32


def tiles(largest: int | None = None) -> list[triton.Config]:
    """What an autotuner may choose from; in the interpreter, which cannot time, one small tile.

    Args:
        largest: outputs of a tile at most; all of them are compiled before the first product, which takes minutes where
            tiles are large and much is done in registers.
    """
    if knobs.runtime.interpret:
        return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16})]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in CANDIDATES
        if largest is None or m * n <= largest
    ]


def milliseconds(launch: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """What a launch takes with its operands in the L2, for an autotuner's `do_bench`.

    Triton's own writes 256 MiB before every launch, to empty that: a quarter of what a whole run may take here. The
    GPU sleeps while the host, which may launch more slowly than a kernel runs, gets ahead.
    """
    launch()  # it is compiled
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        launch()
    ahead = 2 * (time.perf_counter() - began)
    found = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(ahead * CYCLES))
        begin.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / LAUNCHES)
    found.sort()
    return [found[round(share * (len(found) - 1))] for share in quantiles]


@triton.jit
def place_of_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of an [M, N] output: neighbours share columns, so that those stay in L2."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = pid % (GROUP * columns)
    return first + inside % height, inside // height
