"""The one place where noise meets parameters.

Noise is never stored: direction e_i of a parameter is `philox_normal(seed, step, i, param_id)`, made again whenever it
is needed. Sums are formed in fp32 at least and rounded once to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep_lightning.kernels import philox_normal

Probe = tuple[int, float]
"""Where a member stands: (i, sign) is theta + sign * mu * e_i, and sign 0 is theta itself."""


def direction(theta: Tensor, seed: int, step: int, i: int, param_id: int = 0) -> Tensor:
    """e_i ~ N(0, I) in theta's shape, fp32 or wider."""
    noise = philox_normal(seed, step, i, param_id, theta.numel(), theta.device)
    return noise.view(theta.shape).to(torch.promote_types(theta.dtype, torch.float32))


def displaced(theta: Tensor, probe: Probe, mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """theta + sign * mu * e_i in theta's dtype; theta itself, no copy, for sign 0."""
    i, sign = probe
    if sign == 0:
        return theta
    noise = direction(theta, seed, step, i, param_id)
    return torch.add(theta, noise, alpha=sign * mu).to(theta.dtype)


def perturb(theta: Tensor, probes: Sequence[Probe], mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """All members together. theta [...] -> [V, ...], one for each probe."""
    members = theta.new_empty(len(probes), *theta.shape)
    for member, probe in zip(members, probes, strict=True):
        member.copy_(displaced(theta, probe, mu, seed, step, param_id))
    return members


def combine(coefficients: Tensor, theta: Tensor, seed: int, step: int, param_id: int = 0) -> Tensor:
    """sum_i c_i e_i over coefficients [n], in theta's shape and dtype."""
    total = torch.zeros(theta.shape, dtype=torch.promote_types(theta.dtype, torch.float32), device=theta.device)
    for i, coefficient in enumerate(coefficients):
        total.add_(direction(theta, seed, step, i, param_id).mul_(coefficient))
    return total.to(theta.dtype)
