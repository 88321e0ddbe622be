"""Projecting directions out of a gradient, in place (ZOODiP, Subspace Gradient)."""

from __future__ import annotations

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.subspace_project import reference

__all__ = ["subspace_project_"]


@torch.library.custom_op("mep_lightning::subspace_project_", mutates_args=("grad",))
def _subspace_project_(grad: Tensor, basis: Tensor) -> None:
    if runs_triton(grad):
        from mep_lightning.kernels.subspace_project import triton

        if triton.takes(grad, basis):
            return triton.subspace_project_(grad, basis)
    reference.subspace_project_(grad, basis)
    return None


@_subspace_project_.register_fake
def _(grad: Tensor, basis: Tensor) -> None:
    return None


@defined_by(reference.subspace_project_)
def subspace_project_(grad: Tensor, basis: Tensor) -> Tensor:
    """g <- g - P'P g in place.

    Args:
        grad: d elements in any shape.
        basis: P [k, d], orthonormal rows; k may be 0.

    Returns:
        grad, the very tensor.
    """
    _subspace_project_(grad, basis)
    return grad
