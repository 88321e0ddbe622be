"""Symmetric int8 weights, one scale an output channel: the quantiser and the layers that hold its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mep_lightning.kernels import int8_conv2d, int8_linear, int8_linear_w8a8, quantize_rows
from mep_lightning.kernels.dequantize import dequantize_reference
from mep_lightning.quantization.layers import QuantizedConv2d, QuantizedLinear, QuantizedWeight


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise by the largest magnitude of each output channel; the error is at most half a scale.

    Args:
        weight: [O, ...], any floating dtype; the arithmetic is fp32.

    Returns:
        q int8 [O, ...] in [-127, 127], scale fp32 [O] (1 for a channel of zeros), with weight ~ q * scale.
    """
    return quantize_rows(weight)


class Int8Weight(QuantizedWeight):
    """An int8 `weight` [O, ...] and an fp32 `scale` [O]."""

    packed = ("weight", "scale")
    scale: Tensor

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_int8(weight)

    def empty(self, shape: torch.Size, device: Any) -> tuple[Tensor, Tensor]:
        scale = torch.ones(shape[0], dtype=torch.float32, device=device)  # whatever a Trainer's default is
        return torch.zeros(shape, dtype=torch.int8, device=device), scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, ...] in floating point, differentiable in the scale."""
        return dequantize_reference(self.weight, self.scale, dtype)


class Int8Linear(Int8Weight, QuantizedLinear):
    """`nn.Linear` with its weight in int8."""

    multiplies_integers: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        self._refuse_integers(x)
        run = int8_linear_w8a8 if self.multiplies_integers else int8_linear
        return run(x, self.weight, self.scale, self.bias)


@contextmanager
def integer_products() -> Iterator[None]:
    """Let all int8 linear layers round their activations to int8 too, for the length of a `with`; no derivative goes
    through them, but tangents do."""
    before, Int8Linear.multiplies_integers = Int8Linear.multiplies_integers, True
    try:
        yield
    finally:
        Int8Linear.multiplies_integers = before


class Int8Conv2d(Int8Weight, QuantizedConv2d):
    """`nn.Conv2d` with its weight in int8."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, I, H, W] -> [B, O, H', W']."""
        self._refuse_integers(x)
        return int8_conv2d(x, self.weight, self.scale, self.bias, self.stride, self.padding)
