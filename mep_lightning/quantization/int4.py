"""NF4 weights (QLoRA, arXiv 2305.14314) for linear layers and convolutions, packed and unpacked by bitsandbytes.

16 levels that are quantiles of a normal distribution, one fp32 scale for 64 weights in a row: 4.5 bits a weight. The
weight exists in floating point only while it is being used; a backward pass unpacks it again instead of keeping it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from mep_lightning.errors import UserError, reason
from mep_lightning.kernels.dispatch import autocast_activation, needs_op, needs_reference
from mep_lightning.kernels.products import linear
from mep_lightning.quantization.layers import PORTION, QuantizedConv2d, QuantizedLinear, QuantizedWeight

BLOCK = 64  # weights that share a scale; `layers.ROWS` is a multiple

Operation = Callable[..., Tensor]


@functools.cache
def why_not_int4() -> str | None:
    """Why NF4 weights cannot be had, in a few words with the mend; None where they can."""
    try:
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}): pip install 'mep-lightning[int4]'"
    except Exception as error:  # a build for another CUDA or system fails in many ways
        return f"bitsandbytes does not work here ({reason(error)})"
    try:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(torch.ones(1, BLOCK), BLOCK, "nf4", torch.uint8)
        torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", [1, BLOCK], torch.float32)
    except Exception as error:
        return f"bitsandbytes has no backend here ({reason(error)})"
    return None


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight into 4 bits an element.

    Args:
        weight: [O, ...], any floating dtype.

    Returns:
        packed uint8 [ceil(numel / 2)], two elements a byte, and absmax fp32 [ceil(numel / 64)].

    Raises:
        UserError: bitsandbytes is missing or does not work here.
    """
    if reason := why_not_int4():
        raise UserError(f"precision int4: {reason}")
    flat = weight.detach().flatten()
    flat = flat if flat.dtype in (torch.float32, torch.bfloat16, torch.float16) else flat.float()
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(portion[None], BLOCK, "nf4", torch.uint8)
        for portion in flat.split(PORTION)
    ]
    packed, absmax = zip(*parts, strict=True)
    return torch.cat([part.flatten() for part in packed]), torch.cat(absmax)


def dequantize_nf4(packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `quantize_nf4` packed, in fp32, bf16 or fp16 and its own shape (fp64 by way of fp32)."""
    narrow = dtype if dtype.itemsize <= 4 else torch.float32
    row = [shape.numel()]  # on a CPU bitsandbytes begins a new block with every row, which no packed weight does
    values = torch.ops.bitsandbytes.dequantize_4bit(packed[:, None], absmax, BLOCK, "nf4", row, narrow)
    return values.to(dtype).view(shape)


class Int4Weight(QuantizedWeight):
    """A `weight` of packed NF4 (uint8, two elements a byte) and its `absmax` (fp32, one for 64 elements)."""

    packed = ("weight", "absmax")
    absmax: Tensor
    channel: ClassVar[int]  # the dimension of the output's channels

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_nf4(weight)

    def empty(self, shape: torch.Size, device: Any) -> tuple[Tensor, Tensor]:
        size = shape.numel()
        packed = torch.zeros(-(-size // 2), dtype=torch.uint8, device=device)
        return packed, torch.ones(-(-size // BLOCK), dtype=torch.float32, device=device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, ...] in floating point."""
        return self.unpack(self.weight, self.absmax, dtype)

    def unpack(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [O, ...] of the layer's buffers, wherever they lie now."""
        return dequantize_nf4(packed, absmax, self.weight_shape, dtype)

    def _run(self, x: Tensor, operation: Operation, transposed: Operation) -> Tensor:
        """An operation with the weight, which autograd does not keep."""
        self._refuse_integers(x)
        x = autocast_activation(x)
        bias = cast(Tensor | None, self.bias)
        bias = None if bias is None else bias.to(x.dtype)
        if needs_op(x, bias) and not needs_reference():
            packed = self.weight, self.absmax
            return _Transient.apply(x, bias, *packed, self.unpack, operation, transposed, self.channel)
        return operation(x, self.dequantize(x.dtype), bias)


class _Transient(torch.autograd.Function):
    """y = operation(x, W, b) for a frozen W that is made of its packed buffers when it is needed, forward and backward.

    They are saved as tensors are: where weights are streamed, they have left the device before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        unpack: Operation,
        operation: Operation,
        transposed: Operation,
        channel: int,
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape, ctx.unpack, ctx.transposed, ctx.channel = x.shape, unpack, transposed, channel
        return operation(x, unpack(packed, absmax, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.transposed(ctx.shape, ctx.unpack(*ctx.saved_tensors, grad.dtype), grad)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.movedim(ctx.channel, -1).flatten(0, -2).sum(0)
        return grad_x, grad_bias, *[None] * 6


def _linear_input(shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    return linear(grad, weight.T)


class Int4Linear(Int4Weight, QuantizedLinear):
    """`nn.Linear` with its weight in NF4."""

    channel = -1

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return self._run(x, linear, _linear_input)


class Int4Conv2d(Int4Weight, QuantizedConv2d):
    """`nn.Conv2d` with its weight in NF4, packed channels last: CPUs and tensor cores are fastest so."""

    channel = 1

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_nf4(weight.permute(0, 2, 3, 1))

    def unpack(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [O, I, kh, kw] of the layer's buffers, wherever they lie now."""
        outputs, inputs, kh, kw = self.weight_shape
        shape = torch.Size((outputs, kh, kw, inputs))
        return dequantize_nf4(packed, absmax, shape, dtype).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, I, H, W] -> [B, O, H', W']."""
        stride, padding = self.stride, self.padding

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight, bias, stride, padding)

        def transposed(shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
            return conv2d_input(shape, weight, grad, stride, padding)

        return self._run(x, convolve, transposed)
