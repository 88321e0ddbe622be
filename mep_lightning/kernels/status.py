"""Who answers for each operation on this machine: Triton's kernels, or PyTorch's and its libraries'."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from mep_lightning.kernels.dispatch import SWITCH, why_not_triton
from mep_lightning.kernels.products import prefers_onednn

WITH_RIVAL = ("int8_conv2d", "int8_linear")
"""Operations that PyTorch's own libraries do too, on a weight that is dequantised for the moment."""
WITHOUT_TRITON = ("attention",)
"""Operations that PyTorch's own kernels answer on a GPU."""


def status(names: list[str]) -> Iterator[tuple[str, str]]:
    """Which implementation answers for each operation here, and why not Triton's.

    Args:
        names: the operations.
    """
    why_not = why_not_triton()
    on_gpu = torch.cuda.is_available()
    products = "cuBLAS" if on_gpu else "oneDNN" if prefers_onednn() or not torch.backends.mkl.is_available() else "MKL"
    libraries = {"int8_linear": products, "int8_conv2d": "cuDNN" if on_gpu else "oneDNN"}
    for name in names:
        if name in WITH_RIVAL and (why_not or os.environ.get(SWITCH) != "triton"):
            yield name, f"active: PyTorch ({libraries[name]}, the weight dequantised for the moment)"
        elif name in WITHOUT_TRITON:
            blockwise = prefers_onednn() and not on_gpu
            yield name, f"active: PyTorch ({'oneDNN, block by block' if blockwise else 'its own'})"
        else:
            yield name, "active: PyTorch" if why_not else "active: Triton"
    if why_not:
        yield "triton", f"not in use: {why_not}"
    elif os.environ.get(SWITCH) != "triton":
        yield "triton", f"in use; for {' and '.join(WITH_RIVAL)} too with {SWITCH}=triton"
