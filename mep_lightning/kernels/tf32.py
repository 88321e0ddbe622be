"""TF32, which a GPU's fp32 products may round their factors to, and finite differences do not bear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole_products() -> Iterator[None]:
    """Let fp32 products on a GPU keep all 24 bits of their factors, for the length of a `with`.

    PyTorch's convolutions take TF32 there unless told otherwise, which rounds factors to 11 bits.
    """
    backends: Any = torch.backends
    before: list[tuple[Any, str, Any]] = []
    try:
        for one in (backends.cudnn, backends.cuda.matmul):
            before.append((one, "allow_tf32", one.allow_tf32))
            one.allow_tf32 = False
    except RuntimeError:  # someone chose by the newer switches, and the older ones then refuse to be read
        _put_back(before)
        before = []
        for one in (backends.cudnn.conv, backends.cuda.matmul):
            before.append((one, "fp32_precision", one.fp32_precision))
            one.fp32_precision = "ieee"
    try:
        yield
    finally:
        _put_back(before)


def _put_back(before: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in before:
        setattr(owner, name, value)
