"""The update of a zeroth-order step: noise again from its seed, gradient, projection, Adam; the definition."""

from __future__ import annotations

from torch import Tensor

from mep_lightning.kernels.philox.reference import philox_normal
from mep_lightning.kernels.subspace_project.reference import subspace_project_


def zo_gradient(weights: Tensor, like: Tensor, seed: int, step: int, param_id: int, basis: Tensor | None) -> Tensor:
    """sum_i w_i e_i, without the directions of basis; weights [n], `like` any shape -> fp32 of its shape."""
    noises = philox_normal(seed, step, range(len(weights)), param_id, like.numel(), like.device)  # [n, d]
    grad = weights.float().new_zeros(like.shape)
    for weight, noise in zip(weights.float(), noises, strict=True):
        grad += weight * noise.view(like.shape)
    return grad if basis is None else subspace_project_(grad, basis)


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
    """In place on theta, exp_avg, exp_avg_sq and grad; returns theta. Arguments as `kernels.zo_step_`'s."""
    g = zo_gradient(weights, theta, seed, int(step), param_id, basis)
    if grad is not None:
        grad.copy_(g)
    g = g + weight_decay * theta.float()
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    rate, root = pace
    return theta.sub_(rate * exp_avg / (exp_avg_sq.sqrt() / root + eps))
