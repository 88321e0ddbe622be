"""int8 back to floating point: W = q * s, one scale for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mep_lightning.kernels.dequantize.reference import dequantize_reference, per_output
from mep_lightning.kernels.dispatch import defined_by, runs_triton

__all__ = [
    "dequantize",
    "dequantize_reference",
    "gradient_of_scale",
    "per_output",
    "scale_output_",
    "scales_output",
]

PORTION = 2**19  # elements, 2 MiB of fp32; larger portions were no faster


@defined_by(dequantize_reference)
def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values for code that needs no gradient, with as few transient bytes as PyTorch allows.

    A GPU reads and writes every number once, PyTorch's multiplication too where Triton is not there. On CPU that would
    materialise both operands: an fp32 weight is cast and scaled in place (one pass less; 1.3 to 3 times as fast at 192
    to 1280 channels), a narrower one comes about in portions, so that no fp32 copy of it ever exists.

    Args:
        q: int8 weight [O, ...].
        scale: fp32 [O].
        dtype: what the weight becomes.
    """
    if runs_triton(q) and _fuses(q, scale, dtype):
        from mep_lightning.kernels.dequantize import triton

        return triton.dequantize(q, scale, dtype)
    scale = per_output(scale, q.dim())
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide and not (q.is_cuda and wide == scale.dtype):
        return q.to(wide).mul_(scale)
    weight = torch.empty_like(q, dtype=dtype)
    if q.is_cuda or isinstance(q, FakeTensor):  # (portions of nothing take as long to make up as the whole)
        return torch.mul(q, scale, out=weight)
    rows = max(PORTION // max(q[0].numel(), 1), 1)
    for part, factor, target in zip(q.split(rows), scale.split(rows), weight.split(rows), strict=True):
        torch.mul(part.to(wide), factor, out=target)
    return weight


def _fuses(q: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows follow one another densely, as they do in either memory format, and the arithmetic is fp32."""
    is_dense = q.is_contiguous() or (q.dim() == 4 and q.is_contiguous(memory_format=torch.channels_last))
    return is_dense and q.numel() > 0 and dtype.itemsize <= 4 and scale.dtype == torch.float32


def scales_output(x: Tensor) -> bool:
    """Whether a product scales its output rather than the weight: on a CPU in bf16, which holds every int8 exactly.

    The weight is then cast in one pass, where dequantising takes three. The scale is rounded to bf16 for it. fp16 holds
    int8 too, and overflows in their sums.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def scale_output_(y: Tensor, scale: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """y * scale + bias along the output channels' dimension, in place. scale and bias [O]."""
    shape = [-1 if i == dim % y.dim() else 1 for i in range(y.dim())]
    factor = scale.to(y.dtype).view(shape)
    return y.mul_(factor) if bias is None else torch.addcmul(bias.to(y.dtype).view(shape), y, factor, out=y)


def gradient_of_scale(grad_weight: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """That of W = q * s in s, from that in W [O, ...]: summed in the wider dtype of the two, as terms cancel -> [O]."""
    wide = torch.promote_types(grad_weight.dtype, scale.dtype)
    return (grad_weight.to(wide) * q).flatten(1).sum(1).to(scale.dtype)
