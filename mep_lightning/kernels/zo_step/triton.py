"""The update of a zeroth-order step on a GPU in one launch: neither noise nor gradient ever reaches memory.

Step and pace are read from the device, so that a captured CUDA graph can be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mep_lightning.kernels.dispatch import launches
from mep_lightning.kernels.philox.triton import normal_elements
from mep_lightning.kernels.subspace_project.triton import LARGEST, TILE, projected

BLOCK = 2048  # elements a program, where there is no projection


@triton.jit(do_not_specialize=["seed", "param_id", "n", "d", "k"])
def _zo_step_kernel(
    theta,  # [d]
    weights,  # fp32 [n]
    exp_avg,  # fp32 [d]
    exp_avg_sq,  # fp32 [d]
    step,  # int64 [1]
    pace,  # fp32 [2]: lr / (1 - beta1^t), sqrt(1 - beta2^t)
    basis,  # fp32 [k, d]
    grad,  # [d]
    seed,
    param_id,
    n,
    d,
    k,
    gain1,  # 1 - beta1
    gain2,  # 1 - beta2
    eps,
    weight_decay,
    PROJECT: tl.constexpr,
    KEEP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * D
    at = first + tl.arange(0, D)
    inside = at < d
    now = tl.load(step)
    g = tl.zeros((D,), dtype=tl.float32)
    for i in range(n):
        g += tl.load(weights + i) * normal_elements(seed, first // 4, now, i, param_id, D // 4)
    g = tl.where(inside, g, 0.0)
    if PROJECT:
        g = projected(g, basis, k, d, at, ROWS)
    if KEEP:
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside)
    value = tl.load(theta + at, mask=inside, other=0.0).to(tl.float32)
    g += weight_decay * value
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m += gain1 * (g - m)
    v += gain2 * (g * g - v)
    value -= tl.load(pace) * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + tl.load(pace + 1)) + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(theta + at, value.to(theta.dtype.element_ty), mask=inside)


def takes(theta: Tensor, basis: Tensor | None) -> bool:
    """Whether the launch below holds this parameter: contiguous, at most fp32, its basis in fp32 and not too long."""
    fits = basis is None or (theta.numel() <= LARGEST and basis.dtype.itemsize == 4)
    return theta.is_contiguous() and theta.dtype.itemsize <= 4 and fits


@launches
def zo_step_(
    theta: Tensor,
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    pace: Tensor,
    seed: int,
    param_id: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    basis: Tensor | None,
    grad: Tensor | None,
) -> None:
    """As the reference; `takes(theta, basis)` must hold."""
    d = theta.numel()
    k = 0 if basis is None else len(basis)
    width = max(16, triton.next_power_of_2(d)) if k else BLOCK
    _zo_step_kernel[(triton.cdiv(d, width),)](
        theta,
        weights,
        exp_avg,
        exp_avg_sq,
        step,
        pace,
        basis,
        grad,
        seed,
        param_id,
        len(weights),
        d,
        k,
        1 - betas[0],
        1 - betas[1],
        eps,
        weight_decay,
        k > 0,
        grad is not None,
        width,
        max(1, TILE // width),
        num_warps=8,
    )
