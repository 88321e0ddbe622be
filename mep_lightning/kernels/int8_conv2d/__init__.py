"""A convolution with int8 weights: the weight exists in floating point only while it is being used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from mep_lightning.kernels.dequantize import dequantize, gradient_of_scale, scale_output_, scales_output
from mep_lightning.kernels.dispatch import autocast_activation, defined_by, needs_op, needs_reference, runs_triton
from mep_lightning.kernels.int8_conv2d import reference
from mep_lightning.kernels.int8_conv2d.reference import Pair

__all__ = ["gradients", "int8_conv2d"]

PORTION = 2**24
"""Bytes of a weight that exist in floating point at once on a CPU.

More would be memory that the system clears anew each time: with portions and channels last SD1.5's at 16x16 are 1.5
to 1.8 times as fast (`benchmarks kernels`).
"""


def _forward(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    if runs_triton(x, rival=True) and x.dtype.itemsize <= 4:
        from mep_lightning.kernels.int8_conv2d import triton

        return triton.int8_conv2d(x, q, scale, bias, (stride[0], stride[1]), (padding[0], padding[1]))
    channels = len(q) if x.is_cuda else max(PORTION // max(q[0].numel() * x.element_size(), 1), 1)
    if channels >= len(q):
        return _convolve(x, q, scale, bias, stride, padding)
    biases = [None] * len(q) if bias is None else bias.split(channels)
    parts = zip(q.split(channels), scale.split(channels), biases, strict=False)
    return torch.cat([_convolve(x, *part, stride, padding) for part in parts], dim=-3)


def _convolve(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    if scales_output(x):
        return scale_output_(F.conv2d(x, q.to(x.dtype), None, stride, padding), scale, bias, dim=-3)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, dequantize(q, scale, x.dtype), bias, stride, padding)


_int8_conv2d = torch.library.custom_op("mep_lightning::int8_conv2d", _forward, mutates_args=())


@_int8_conv2d.register_fake
def _(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    # The convolution of fakes knows the output's size and memory format.
    return F.conv2d(x, torch.empty_like(q, dtype=x.dtype), None, stride, padding)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, scale, _, ctx.stride, ctx.padding = inputs
    ctx.x_shape = x.shape
    ctx.save_for_backward(q, scale, x if ctx.needs_input_grad[2] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, scale, x = ctx.saved_tensors
    how = ctx.stride, ctx.padding
    grad_x = _gradient_of_x(grad, ctx.x_shape, q, scale, *how) if ctx.needs_input_grad[0] else None
    grad_scale = None if x is None else _gradient_of_scale(grad, x, q, scale, *how)
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return grad_x, None, grad_scale, grad_bias, None, None


def _gradient_of_x(
    grad: Tensor, shape: torch.Size, q: Tensor, scale: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    return conv2d_input(shape, dequantize(q, scale, grad.dtype), grad, stride, padding)


def _gradient_of_scale(
    grad: Tensor, x: Tensor, q: Tensor, scale: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    grad_weight = conv2d_weight(x, q.shape, grad, stride, padding)  # [O, I, kh, kw]
    return gradient_of_scale(grad_weight, q, scale)


def gradients(
    grad: Tensor, x: Tensor, q: Tensor, scale: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of `int8_conv2d` in x and scale, from that of its result; shapes as there."""
    how = stride, padding
    return _gradient_of_x(grad, x.shape, q, scale, *how), _gradient_of_scale(grad, x, q, scale, *how)


_int8_conv2d.register_autograd(_backward, setup_context=_setup_context)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@defined_by(reference.int8_conv2d)
def int8_conv2d(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0
) -> Tensor:
    """conv2d(x, q * s) + b; dtype and arithmetic follow x. Backward dequantises again instead of keeping the weight.

    Args:
        x: activations [B, I, H, W], floating point.
        q: int8 weight [O, I, kh, kw]; its memory format is the transient weight's.
        scale: fp32 [O]; gets a gradient where it asks for one.
        bias: [O], any floating dtype.
        stride, padding: one number or (vertical, horizontal).

    Returns:
        [B, O, H', W'] in x's dtype (in autocast's, where autocast is on).
    """
    if needs_reference():
        return reference.int8_conv2d(x, q, scale, bias, stride, padding)
    run = _int8_conv2d if needs_op(x, scale, bias) else _forward
    return run(autocast_activation(x), q, scale, bias, _pair(stride), _pair(padding))
