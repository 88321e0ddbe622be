"""Layers: products with weights that all rows share, norms, and attention; statistics in fp32 at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning import kernels
from mep_lightning.kernels import products
from mep_lightning.tangents.dual import Dual, NoRuleError, aligned, rule, stacked

# -- products ----------------------------------------------------------------------------------------------------------


def _biased_(stack: Tensor, bias: Tensor | None, dim: int = -1) -> Dual:
    """Add a bias to the value alone, in place."""
    if bias is not None:
        stack[0].add_(bias.to(stack.dtype) if dim == -1 else bias.to(stack.dtype)[:, None, None])
    return Dual(stack)


@rule(F.linear, products.linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dual:
    """x W' + b; (x W')' = dx W' + x dW'."""
    if isinstance(bias, Dual):
        return F.linear(x, weight) + bias  # type: ignore[return-value]
    if not isinstance(weight, Dual):
        assert isinstance(x, Dual)
        return _biased_(products.linear(x.stack, weight), bias)
    value, moves = weight.value, weight.tangents  # [O, I], [n, O, I]
    own = x.value if isinstance(x, Dual) else x
    along = torch.stack([products.linear(own, move) for move in moves])  # [n, ..., O]
    if isinstance(x, Dual):
        stack = products.linear(x.stack, value)
        stack[1:].add_(along)
        return _biased_(stack, bias)
    return _biased_(torch.cat([products.linear(own, value)[None], along]), bias)


@rule(kernels.int8_linear)
def _int8_linear(x: Dual, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Dual:
    return _biased_(kernels.int8_linear(x.stack, q, scale), bias)


@rule(kernels.int8_linear_w8a8)
def _int8_linear_w8a8(x: Dual, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Dual:
    """Every row of value and tangents has a scale of its own, so that neither rounds the other away."""
    return _biased_(kernels.int8_linear_w8a8(x.stack, q, scale), bias)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
def _matmul(x: Tensor, y: Tensor) -> Dual:
    if x.dim() == 1 or y.dim() == 1:  # as a row, as a column
        row, column = x.dim() == 1, y.dim() == 1
        product = _matmul(x.unsqueeze(0) if row else x, y.unsqueeze(-1) if column else y)
        product = product.squeeze(-1) if column else product
        return product.squeeze(-1 if column else -2) if row else product
    dims = max(x.dim(), y.dim())  # batches of fewer dimensions broadcast, and directions are no batch
    left, right = (aligned(z.stack, dims) if isinstance(z, Dual) else z for z in (x, y))
    if not (isinstance(x, Dual) and isinstance(y, Dual)):
        return Dual(left @ right)
    stack = left @ right[0]
    stack[1:] += left[0] @ right[1:]
    return Dual(stack)


def _convolved(x: Dual, run: Callable[[Tensor], Tensor]) -> Tensor:
    """A convolution of value and tangents as one batch."""
    return run(x.stack.flatten(0, 1)).unflatten(0, x.stack.shape[:2])


@rule(F.conv2d)
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any, **given: Any) -> Dual:
    if x.dim() == 3:
        return _conv2d(x[None], weight, bias, *how, **given)[0]
    if isinstance(bias, Dual):
        return F.conv2d(x, weight, None, *how, **given) + bias[:, None, None]  # type: ignore[return-value]
    if not isinstance(weight, Dual):
        assert isinstance(x, Dual)
        return _biased_(_convolved(x, lambda rows: F.conv2d(rows, weight, None, *how, **given)), bias, dim=1)
    own = x.value if isinstance(x, Dual) else x
    along = torch.stack([F.conv2d(own, move, None, *how, **given) for move in weight.tangents])
    if isinstance(x, Dual):
        stack = _convolved(x, lambda rows: F.conv2d(rows, weight.value, None, *how, **given))
        stack[1:].add_(along)
    else:
        stack = torch.cat([F.conv2d(own, weight.value, None, *how, **given)[None], along])
    return _biased_(stack, bias, dim=1)


@rule(kernels.int8_conv2d)
def _int8_conv2d(
    x: Dual, q: Tensor, scale: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0
) -> Dual:
    stack = _convolved(x, lambda rows: kernels.int8_conv2d(rows, q, scale, None, stride, padding))
    return _biased_(stack, bias, dim=1)


@rule(F.interpolate)
def _interpolate(x: Dual, *how: Any, **given: Any) -> Dual:
    return Dual(_convolved(x, lambda rows: F.interpolate(rows, *how, **given)))


# -- norms -------------------------------------------------------------------------------------------------------------


@rule(F.layer_norm)
def _layer_norm(
    x: Dual, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Dual:
    _refuse_trained_norm(x, weight, bias)
    return Dual(kernels.layer_norm_tangents(x.stack, shape, weight, bias, eps))


@rule(F.group_norm, kernels.group_norm)
def _group_norm(
    x: Dual, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Dual:
    _refuse_trained_norm(x, weight, bias)
    return Dual(kernels.group_norm_tangents(x.stack, groups, weight, bias, eps))


def _refuse_trained_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not isinstance(x, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
        raise NoRuleError("a norm whose own weight or bias has tangents has no rule")


# -- attention ---------------------------------------------------------------------------------------------------------


@rule(torch.softmax, Tensor.softmax, F.softmax)
def _softmax(x: Dual, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Dual:
    """P = softmax(x); dP = P (dx - sum(P dx))."""
    wide = x.stack.to(dtype or torch.promote_types(x.dtype, torch.float32))
    share = wide[0].softmax(dim)
    moved = share * wide[1:]
    moved.addcmul_(share.expand_as(moved), moved.sum(dim if dim < 0 else dim + 1, keepdim=True), value=-1)
    return Dual(torch.cat([share[None], moved]).to(dtype or x.dtype))


def _all_stacked(*tensors: Tensor) -> list[Tensor]:
    like = next(x.stack for x in tensors if isinstance(x, Dual))
    return [stacked(x, like) for x in tensors]


@rule(kernels.attention)
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Dual:
    return Dual(kernels.attention_tangents(*_all_stacked(q, k, v)))


@rule(F.scaled_dot_product_attention)
def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual:
    """With a mask, which is what text encoders' short sequences have, or unlike shapes: scores are held whole."""
    if dropout_p or enable_gqa or isinstance(attn_mask, Dual):
        raise NoRuleError("attention with dropout, grouped queries or a mask's tangents has no rule for tangents")
    is_plain = attn_mask is None and not is_causal and scale is None and query.dim() == 4
    if is_plain and key.shape == value.shape == (*query.shape[:2], key.shape[-2], query.shape[-1]):
        return _attention(query, key, value)
    q, k, v = (
        Dual(stack.to(torch.promote_types(stack.dtype, torch.float32))) for stack in _all_stacked(query, key, value)
    )
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        sees = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        attn_mask = sees if attn_mask is None else attn_mask & sees
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _matmul(scores.softmax(-1), v).to(query.dtype)
