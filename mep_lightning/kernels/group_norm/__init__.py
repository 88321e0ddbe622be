"""A group norm that leaves channels last where they are: PyTorch's on a GPU copies such images to the other format."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dispatch import defined_by, is_plain, runs_triton
from mep_lightning.kernels.group_norm import reference
from mep_lightning.kernels.stacks import is_channels_last

__all__ = ["group_norm"]


@defined_by(reference.group_norm)
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """w (x - m) / s + b, statistics in fp32 at least.

    Args:
        x: [B, C, *pixels], any floating dtype.
        groups: how many share the channels.
        weight, bias: [C], or None.
        eps: added to the variance.

    Returns:
        The same in x's shape and dtype; where no gradient is asked for, in its memory format.
    """
    is_plain_image = is_channels_last(x) and is_plain(x, weight, bias) and not torch.is_autocast_enabled(x.device.type)
    if is_plain_image and runs_triton(x) and x.dtype.itemsize <= 4 and x.numel():
        from mep_lightning.kernels.norm_tangents import triton

        return triton.group_norm_tangents(x[None], groups, weight, bias, eps)[0]
    return F.group_norm(x, groups, weight, bias, eps)
