"""The one place where noise meets parameters.

Noise is never stored: direction e_i of a parameter is `philox_normal(seed, step, i, param_id)`, made again whenever it
is needed. Sums are formed in fp32 at least and rounded once to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mep_lightning.kernels import philox_normal

Probe = tuple[int, float]
"""Where a member stands: (i, sign) is theta + sign * mu * e_i, and sign 0 is theta itself."""

DRAWN_TOGETHER = 1 << 16
"""Normals of several directions that one call may draw: a token's cost a call each (1 ms), whatever their number."""


def directions(theta: Tensor, seed: int, step: int, wanted: Sequence[int], param_id: int = 0) -> Iterator[Tensor]:
    """e_i ~ N(0, I) for every wanted i, in theta's shape, fp32 or wider; a few at a time where they are large."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    together = max(1, DRAWN_TOGETHER // max(1, theta.numel()))
    for start in range(0, len(wanted), together):
        drawn = philox_normal(seed, step, wanted[start : start + together], param_id, theta.numel(), theta.device)
        yield from (noise.view(theta.shape).to(dtype) for noise in drawn)


def direction(theta: Tensor, seed: int, step: int, i: int, param_id: int = 0) -> Tensor:
    """e_i alone."""
    return next(directions(theta, seed, step, [i], param_id))


def displaced(theta: Tensor, probe: Probe, mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """theta + sign * mu * e_i in theta's dtype; theta itself, no copy, for sign 0."""
    i, sign = probe
    return theta if sign == 0 else _moved(theta, direction(theta, seed, step, i, param_id), sign * mu)


def perturb(theta: Tensor, probes: Sequence[Probe], mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """All members together. theta [...] -> [V, ...], one for each probe."""
    members = theta.new_empty(len(probes), *theta.shape)
    noises = directions(theta, seed, step, [i for i, sign in probes if sign], param_id)
    for member, (_, sign) in zip(members, probes, strict=True):
        member.copy_(_moved(theta, next(noises), sign * mu) if sign else theta)
    return members


def combine(coefficients: Tensor, theta: Tensor, seed: int, step: int, param_id: int = 0) -> Tensor:
    """sum_i c_i e_i over coefficients [n], in theta's shape and dtype."""
    total = torch.zeros(theta.shape, dtype=torch.promote_types(theta.dtype, torch.float32), device=theta.device)
    noises = directions(theta, seed, step, range(len(coefficients)), param_id)
    for coefficient, noise in zip(coefficients, noises, strict=True):
        total.add_(noise.mul_(coefficient))
    return total.to(theta.dtype)


def _moved(theta: Tensor, noise: Tensor, by: float) -> Tensor:
    return torch.add(theta, noise, alpha=by).to(theta.dtype)
