"""A linear layer with int8 weights, and with int8 activations too: the definitions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dequantize import dequantize_reference
from mep_lightning.kernels.quantize_rows.reference import quantize_rows


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (q * s)' + b in the activation's dtype. x [..., I], q [O, I] int8, scale [O], bias [O] -> [..., O]."""
    weight = dequantize_reference(q, scale, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def int8_linear_w8a8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (xq q') * xs * s + b with x ~ xq * xs, a scale a row; the sums are exact. Shapes as for `int8_linear`."""
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))  # [M, I], [M]
    sums = (rows.double() @ q.double().T).float()  # whole numbers below 2^24 * I / 1040: fp64 holds them all
    y = sums * scale * row_scale[:, None]
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], q.shape[0])
