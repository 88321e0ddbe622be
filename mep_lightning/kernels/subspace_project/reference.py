"""Projecting directions out of a gradient: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_project_(grad: Tensor, basis: Tensor) -> Tensor:
    """g <- g - P'P g in place, in the basis' precision; returns grad. grad: d elements in any shape; basis P [k, d]."""
    with torch.autocast(grad.device.type, enabled=False):  # it would leave a part of them in
        flat = grad.reshape(-1).to(basis.dtype)  # [d]
        return grad.sub_((basis.T @ (basis @ flat)).view(grad.shape))
