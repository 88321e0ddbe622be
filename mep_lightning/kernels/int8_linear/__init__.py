"""A linear layer with int8 weights: the weight exists in floating point only while it is being used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning.kernels.dequantize import dequantize
from mep_lightning.kernels.dispatch import autocast_activation, defined_by, needs_op, needs_reference
from mep_lightning.kernels.int8_linear import reference

__all__ = ["int8_linear"]


def _forward(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(q, scale, x.dtype), None if bias is None else bias.to(x.dtype))


_int8_linear = torch.library.custom_op("mep_lightning::int8_linear", _forward, mutates_args=())


@_int8_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, scale, _ = inputs
    ctx.save_for_backward(q, scale, x if ctx.needs_input_grad[2] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, scale, x = ctx.saved_tensors
    grad_x = grad_scale = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])  # [N, O]
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(q, scale, grad.dtype)
    if x is not None:
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1])  # [O, I]
        grad_scale = (grad_weight.to(scale.dtype) * q).sum(1)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0)
    return grad_x, None, grad_scale, grad_bias


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
