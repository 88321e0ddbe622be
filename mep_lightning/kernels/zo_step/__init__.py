"""The update of a zeroth-order step in one go: noise again from its seed, gradient, projection, Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.zo_step import reference

__all__ = ["zo_step_"]


@torch.library.custom_op("mep_lightning::zo_step_", mutates_args=("theta", "exp_avg", "exp_avg_sq", "grad"))
def _zo_step_(
    theta: Tensor,
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    pace: Tensor,
    seed: int,
    param_id: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    basis: Tensor | None,
    grad: Tensor | None,
) -> None:
    arguments = (theta, weights, exp_avg, exp_avg_sq, step, pace, seed, param_id, (beta1, beta2), eps, weight_decay)
    if runs_triton(theta):
        from mep_lightning.kernels.zo_step import triton

        if triton.takes(theta, basis):
            return triton.zo_step_(*arguments, basis, grad)
    reference.zo_step_(*arguments, basis, grad)
    return None


@_zo_step_.register_fake
def _(*arguments: object) -> None:
    return None


@defined_by(reference.zo_step_)
def zo_step_(
    theta: Tensor,
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    pace: Tensor,
    seed: int,
    param_id: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    basis: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """g = sum_i w_i e_i, g <- g - P'P g, and the update of theta by g that PyTorch's Adam makes, in place.

    Neither the directions e_i nor, unless asked for, the gradient are kept: on a GPU they only exist in registers.

    Args:
        theta: any shape, d elements.
        weights: fp32 [n], what the losses say about each direction (`ZerothOrderEstimator.weights`).
        exp_avg, exp_avg_sq: Adam's moments, fp32, shaped like theta.
        step: int64 [1], the step whose directions these are. On theta's device, like `pace`, so that a captured CUDA
            graph can be replayed for the next one.
        pace: fp32 [2], lr / (1 - beta1^t) and sqrt(1 - beta2^t) of the t-th update.
        seed, param_id: of the directions, as in `philox_normal`.
        betas, eps, weight_decay: Adam's.
        basis: P [k, d], the directions to project out, or None.
        grad: shaped like theta; receives the projected gradient.

    Returns:
        theta, the very tensor.
    """
    seed &= (1 << 64) - 1
    signed = seed - (1 << 64) if seed >> 63 else seed  # an op's integers are signed
    _zo_step_(theta, weights, exp_avg, exp_avg_sq, step, pace, signed, param_id, *betas, eps, weight_decay, basis, grad)
    return theta
