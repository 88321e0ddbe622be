"""The gate of a GEGLU layer: on a GPU both halves are read once, and no gate is ever whole in memory."""

from __future__ import annotations

from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, is_plain, runs_triton
from mep_lightning.kernels.geglu import reference

__all__ = ["geglu"]


@defined_by(reference.geglu)
def geglu(x: Tensor) -> Tensor:
    """a gelu(b) of x = [a, b]; gelu is the exact one.

    Args:
        x: [..., 2 C], any floating dtype.

    Returns:
        [..., C], as precise as its dtype.
    """
    if is_plain(x) and runs_triton(x) and x.dtype.itemsize <= 4 and x.numel() and x.is_contiguous():
        from mep_lightning.kernels.geglu import triton

        return triton.geglu(x)
    return reference.geglu(x)
