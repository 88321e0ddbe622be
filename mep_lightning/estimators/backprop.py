"""The exact gradient, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.estimators.perturbation import HERE, Members

HALF_PRECISION_SCALE = 2.0**10
"""Keeps fp16's gradients from underflowing; a power of two changes no digit of any other dtype's."""


class Backprop(Estimator):
    """One member, theta itself, and reverse-mode autograd."""

    forward_only = False
    seed: int | None = None  # draws no directions

    @property
    def members(self) -> int:
        return 1

    def estimate(self, loss_fn: LossFn, theta: Tensor, step: int = 0, dims: int | None = None) -> tuple[Tensor, Tensor]:
        """As `Estimator.estimate`; `step` and `dims` change nothing."""
        with torch.enable_grad():
            point = theta.detach().requires_grad_()
            losses = loss_fn(point.unsqueeze(0))  # [1]
            (grad,) = torch.autograd.grad(losses.sum() * HALF_PRECISION_SCALE, point)
        return grad / HALF_PRECISION_SCALE, losses.detach()

    def backward(self, loss_fn: Callable[[Members], Tensor], parameters: Iterable[Tensor]) -> Tensor:
        """Fill the parameters' `grad`; the losses [1]. `loss_fn` answers the losses of members."""
        with torch.enable_grad():
            losses = loss_fn(HERE)  # [1]
            (losses.sum() * HALF_PRECISION_SCALE).backward()
        for theta in parameters:
            if theta.grad is not None:
                theta.grad.div_(HALF_PRECISION_SCALE)
        return losses.detach()
