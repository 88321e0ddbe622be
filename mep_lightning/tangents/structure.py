"""Where values lie: shapes, parts, joins and casts, all of them linear, so that tangents do as their value does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mep_lightning.tangents.dual import Dual, NoRuleError, aligned, rule, stacked


def _dim(dim: int) -> int:
    """A dimension of a value as one of its stack, whose first is of the tangents."""
    return dim + 1 if dim >= 0 else dim


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes as they may be given: one after the other, or in a sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@rule(Tensor.view)
def _view(x: Dual, *sizes: Any) -> Dual:
    if sizes and isinstance(sizes[0], torch.dtype):
        raise NoRuleError("Tensor.view as another dtype has no rule for tangents")
    return Dual(x.stack.view(len(x.stack), *_sizes(sizes)))


@rule(Tensor.reshape)
def _reshape(x: Dual, *sizes: Any) -> Dual:
    return Dual(x.stack.reshape(len(x.stack), *_sizes(sizes)))


@rule(torch.reshape)
def _reshaped(x: Dual, shape: Sequence[int]) -> Dual:
    return _reshape(x, shape)


@rule(Tensor.view_as, Tensor.reshape_as)
def _view_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


@rule(Tensor.flatten, torch.flatten)
def _flatten(x: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    return Dual(x.stack.flatten(_dim(start_dim), _dim(end_dim)) if x.dim() else x.stack[:, None])


@rule(Tensor.unflatten, torch.unflatten)
def _unflatten(x: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    return Dual(x.stack.unflatten(_dim(dim), sizes))


@rule(Tensor.transpose, torch.transpose)
def _transpose(x: Dual, dim0: int, dim1: int) -> Dual:
    return Dual(x.stack.transpose(_dim(dim0), _dim(dim1)))


@rule(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _matrix_transpose(x: Dual) -> Dual:
    return Dual(x.stack.mT)


@rule(Tensor.T.__get__)  # type: ignore[attr-defined]
def _transposed(x: Dual) -> Dual:
    return Dual(x.stack.permute(0, *range(x.dim(), 0, -1)))


@rule(Tensor.permute)
def _permute(x: Dual, *dims: Any) -> Dual:
    return Dual(x.stack.permute(0, *map(_dim, _sizes(dims))))


@rule(torch.permute)
def _permuted(x: Dual, dims: Sequence[int]) -> Dual:
    return _permute(x, dims)


@rule(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(x: Dual, dim: int) -> Dual:
    return Dual(x.stack.unsqueeze(_dim(dim)))


@rule(Tensor.squeeze, torch.squeeze)
def _squeeze(x: Dual, dim: int | Sequence[int] | None = None) -> Dual:
    if dim is None:
        dim = [index for index, size in enumerate(x.shape) if size == 1]
    dims = [dim] if isinstance(dim, int) else dim
    return Dual(x.stack.squeeze(tuple(map(_dim, dims))) if dims else x.stack)


@rule(Tensor.expand)
def _expand(x: Dual, *sizes: Any) -> Dual:
    sizes = _sizes(sizes)
    return Dual(aligned(x.stack, len(sizes)).expand(len(x.stack), *sizes))


@rule(Tensor.repeat)
def _repeat(x: Dual, *times: Any) -> Dual:
    times = _sizes(times)
    return Dual(aligned(x.stack, len(times)).repeat(1, *times))


@rule(Tensor.contiguous)
def _contiguous(x: Dual, memory_format: torch.memory_format = torch.contiguous_format) -> Dual:
    if memory_format == torch.contiguous_format:
        return Dual(x.stack.contiguous())
    rows = x.stack.flatten(0, 1).contiguous(memory_format=memory_format)  # the stack itself has a dimension too many
    return Dual(rows.unflatten(0, x.stack.shape[:2]))


@rule(Tensor.is_contiguous)
def _is_contiguous(x: Dual, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    return x.value.is_contiguous(memory_format=memory_format)


@rule(Tensor.clone, torch.clone)
def _clone(x: Dual, *, memory_format: torch.memory_format = torch.preserve_format) -> Dual:
    if memory_format != torch.preserve_format:
        return _contiguous(_clone(x), memory_format)
    return Dual(x.stack.clone())


@rule(Tensor.detach, torch.detach)
def _detach(x: Dual) -> Tensor:
    """The value alone: derivatives end here, as those of a backward pass do."""
    return x.value


@rule(Tensor.to)
def _to(x: Any, *where: Any, **given: Any) -> Any:
    where = tuple(one.value if isinstance(one, Dual) else one for one in where)  # asked for its dtype and device alone
    if not isinstance(x, Dual):
        return x.to(*where, **given)
    if (memory_format := given.pop("memory_format", torch.preserve_format)) != torch.preserve_format:
        return _contiguous(_to(x, *where, **given), memory_format)
    stack = x.stack.to(*where, **given)
    if not stack.is_floating_point():
        raise NoRuleError(f"a tensor with tangents cannot become {stack.dtype}: integers have no derivative")
    return Dual(stack)


@rule(Tensor.type_as)
def _type_as(x: Any, other: Tensor) -> Any:
    return _to(x, other)


@rule(Tensor.cpu)
def _cpu(x: Dual) -> Dual:
    return _to(x, "cpu")


@rule(Tensor.float)
def _float(x: Dual) -> Dual:
    return _to(x, torch.float32)


@rule(Tensor.half)
def _half(x: Dual) -> Dual:
    return _to(x, torch.float16)


@rule(Tensor.bfloat16)
def _bfloat16(x: Dual) -> Dual:
    return _to(x, torch.bfloat16)


@rule(Tensor.double)
def _double(x: Dual) -> Dual:
    return _to(x, torch.float64)


@rule(Tensor.__getitem__)
def _part(x: Any, index: Any) -> Dual:
    if not isinstance(x, Dual):
        raise NoRuleError("a tensor with tangents is no index")
    parts = index if isinstance(index, tuple) else (index,)
    plain = int, slice, type(None), type(...)
    if not all(isinstance(part, plain) for part in parts):  # the dimension of tensors, lists or arrays may come first
        return Dual(torch.stack([one[index] for one in x.stack]))
    return Dual(x.stack[(slice(None), *parts)])


@rule(Tensor.chunk, torch.chunk)
def _chunk(x: Dual, chunks: int, dim: int = 0) -> tuple[Dual, ...]:
    return tuple(map(Dual, x.stack.chunk(chunks, _dim(dim))))


@rule(Tensor.split, torch.split)
def _split(x: Dual, split_size: Any, dim: int = 0) -> tuple[Dual, ...]:
    return tuple(map(Dual, x.stack.split(split_size, _dim(dim))))


@rule(Tensor.unbind, torch.unbind)
def _unbind(x: Dual, dim: int = 0) -> tuple[Dual, ...]:
    return tuple(map(Dual, x.stack.unbind(_dim(dim))))


@rule(Tensor.__iter__)
def _iterate(x: Dual) -> Any:
    return iter(_unbind(x))


@rule(torch.cat, torch.concat)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Dual:
    like = next(x.stack for x in tensors if isinstance(x, Dual))
    stacks = [stacked(x, like) for x in tensors]
    if dim in (0, -like.dim() + 1):
        return Dual(torch.cat(stacks, 1))
    rows = torch.cat([stack.flatten(0, 1) for stack in stacks], dim)  # whose memory format torch knows
    return Dual(rows.unflatten(0, (len(like), -1)))


@rule(torch.stack)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Dual:
    like = next(x.stack for x in tensors if isinstance(x, Dual))
    return Dual(torch.stack([stacked(x, like) for x in tensors], _dim(dim)))


@rule(Tensor.where)
def _where_not(x: Any, condition: Tensor, y: Any) -> Dual:
    return _where(condition, x, y)


@rule(torch.where)
def _where(condition: Tensor, x: Any, y: Any) -> Dual:
    if isinstance(condition, Dual):
        raise NoRuleError("a tensor with tangents is no condition")
    like = x.stack if isinstance(x, Dual) else y.stack
    mine, other = stacked(x, like), stacked(y, like)
    dims = max(condition.dim(), mine.dim() - 1, other.dim() - 1)
    return Dual(torch.where(condition, aligned(mine, dims), aligned(other, dims)))


@rule(Tensor.masked_fill, torch.masked_fill)
def _masked_fill(x: Any, mask: Tensor, value: Any) -> Dual:
    return _where(mask, value, x)


def _constant(function: Any) -> None:
    """What is made in a tensor's dtype and place, or in its shape, does not depend on its values."""
    rule(function)(lambda x, *how, **given: function(x.value, *how, **given))


MADE: list[Any] = [Tensor.new_full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_tensor]
MADE += [torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.randn_like]
for _function in MADE:
    _constant(_function)
