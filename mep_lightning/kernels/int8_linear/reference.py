"""A linear layer with int8 weights and floating-point activations: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dequantize import dequantize_reference


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (q * s)' + b in the activation's dtype. x [..., I], q [O, I] int8, scale [O], bias [O] -> [..., O]."""
    weight = dequantize_reference(q, scale, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
