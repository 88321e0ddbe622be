"""Linear layers with int8 weights: with floating-point activations the weight exists as such only while it is used.

`int8_linear_w8a8` quantises the activations too, a scale a row, and multiplies integers: for forward passes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dequantize import dequantize, gradient_of_scale, scale_output_, scales_output
from mep_lightning.kernels.dispatch import (
    asks_gradient,
    autocast_activation,
    defined_by,
    needs_op,
    needs_reference,
    runs_triton,
)
from mep_lightning.kernels.int8_linear import reference
from mep_lightning.kernels.products import linear
from mep_lightning.kernels.quantize_rows import quantize_rows

__all__ = ["gradients", "int8_linear", "int8_linear_w8a8"]


def _forward(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if runs_triton(x, rival=True) and x.dtype.itemsize <= 4:
        from mep_lightning.kernels.int8_linear import triton

        return triton.int8_linear(x, q, scale, bias)
    if scales_output(x):
        return scale_output_(F.linear(x, q.to(x.dtype)), scale, bias, dim=-1)
    return linear(x, dequantize(q, scale, x.dtype), None if bias is None else bias.to(x.dtype))


_int8_linear = torch.library.custom_op("mep_lightning::int8_linear", _forward, mutates_args=())


@_int8_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, scale, _ = inputs
    ctx.save_for_backward(q, scale, x if ctx.needs_input_grad[2] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, scale, x = ctx.saved_tensors
    grad_x = _gradient_of_x(grad, q, scale) if ctx.needs_input_grad[0] else None
    grad_scale = None if x is None else _gradient_of_scale(grad, x, q, scale)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, None, grad_scale, grad_bias


def _gradient_of_x(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return linear(grad, dequantize(q, scale, grad.dtype).T)


def _gradient_of_scale(grad: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    grad_weight = linear(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)  # [O, I]
    return gradient_of_scale(grad_weight, q, scale)


def gradients(grad: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of `int8_linear` in x and scale, from that of its result; shapes as there."""
    return _gradient_of_x(grad, q, scale), _gradient_of_scale(grad, x, q, scale)


_int8_linear.register_autograd(_backward, setup_context=_setup_context)


@defined_by(reference.int8_linear)
def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (q * s)' + b; dtype and arithmetic follow x. Backward dequantises again instead of keeping the weight.

    Args:
        x: activations [..., I], floating point.
        q: int8 weight [O, I].
        scale: fp32 [O]; gets a gradient where it asks for one.
        bias: [O], any floating dtype.

    Returns:
        [..., O] in x's dtype (in autocast's, where autocast is on).
    """
    if needs_reference():
        return reference.int8_linear(x, q, scale, bias)
    run = _int8_linear if needs_op(x, scale, bias) else _forward
    return run(autocast_activation(x), q, scale, bias)


@torch.library.custom_op("mep_lightning::int8_linear_w8a8", mutates_args=())
def _int8_linear_w8a8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))  # [M, I], [M]
    shape = (*x.shape[:-1], q.shape[0])
    if runs_triton(x):
        from mep_lightning.kernels.int8_linear import triton

        return triton.int8_linear_w8a8(rows, row_scale, q, scale, bias, x.dtype).view(shape)
    if x.is_cuda or q.shape[1] == 1:  # cuBLAS multiplies int8 at some shapes only; torch 2.13's CPU errs at this one
        return reference.int8_linear_w8a8(x, q, scale, bias)
    y = torch._int_mm(rows, q.T).to(torch.float32).mul_(scale).mul_(row_scale[:, None])
    if bias is not None:
        y.add_(bias.float())
    return y.to(x.dtype).view(shape)


@_int8_linear_w8a8.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


@defined_by(reference.int8_linear_w8a8)
def int8_linear_w8a8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `int8_linear`, with x quantised to int8 by the largest magnitude of each row; it has no gradient.

    Args:
        x: activations [..., I], fp32, bf16 or fp16.
        q: int8 weight [O, I].
        scale: fp32 [O].
        bias: [O], any floating dtype.

    Returns:
        [..., O] in x's dtype (in autocast's, where autocast is on).

    Raises:
        NotImplementedError: a derivative is asked for; rounding has none, and a silent zero would be wrong.
    """
    if needs_reference() or asks_gradient(x, scale, bias):
        raise NotImplementedError("int8_linear_w8a8 rounds its activations and has no derivative: use int8_linear")
    return _int8_linear_w8a8(autocast_activation(x), q, scale, bias)
