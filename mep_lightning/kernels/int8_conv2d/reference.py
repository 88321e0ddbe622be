"""A convolution with int8 weights and floating-point activations: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dequantize import dequantize_reference

Pair = int | tuple[int, int]


def int8_conv2d(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0
) -> Tensor:
    """conv2d(x, q * s) + b in the activation's dtype. x [B, I, H, W], q [O, I, kh, kw] int8, scale [O], bias [O]."""
    weight = dequantize_reference(q, scale, x.dtype)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)
