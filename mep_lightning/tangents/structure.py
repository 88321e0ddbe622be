"""Where values lie: shapes, parts, joins and casts, all of them linear, so that tangents do as their value does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mep_lightning.tangents.dual import Dual, aligned, rule, stacked


def _dim(dim: int) -> int:
    """A dimension of a value as one of its stack, whose first is of the tangents."""
    return dim + 1 if dim >= 0 else dim


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes as they may be given: one after the other, or in a sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@rule(Tensor.view)
def _view(x: Dual, *sizes: Any) -> Dual:
    return Dual(x.stack.view(len(x.stack), *_sizes(sizes)))


@rule(Tensor.reshape)
def _reshape(x: Dual, *sizes: Any) -> Dual:
    return Dual(x.stack.reshape(len(x.stack), *_sizes(sizes)))


@rule(torch.reshape)
def _reshaped(x: Dual, shape: Sequence[int]) -> Dual:
    return _reshape(x, shape)


@rule(Tensor.view_as, Tensor.reshape_as)
def _view_as(x: Dual, other: Tensor) -> Dual:
    return _reshape(x, other.shape)


@rule(Tensor.flatten, torch.flatten)
def _flatten(x: Dual, start_dim: int = 0, end_dim: int = -1) -> Dual:
    return Dual(x.stack.flatten(_dim(start_dim), _dim(end_dim)))


@rule(Tensor.unflatten, torch.unflatten)
def _unflatten(x: Dual, dim: int, sizes: Sequence[int]) -> Dual:
    return Dual(x.stack.unflatten(_dim(dim), sizes))


@rule(Tensor.transpose, torch.transpose)
def _transpose(x: Dual, first: int, second: int) -> Dual:
    return Dual(x.stack.transpose(_dim(first), _dim(second)))


@rule(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _matrix_transpose(x: Dual) -> Dual:
    return Dual(x.stack.mT)


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
def _squeeze(x: Dual, dim: int) -> Dual:
    return Dual(x.stack.squeeze(_dim(dim)))


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
def _clone(x: Dual, **_: Any) -> Dual:
    return Dual(x.stack.clone())


@rule(Tensor.detach, torch.detach)
def _detach(x: Dual) -> Tensor:
    """The value alone: derivatives end here, as those of a backward pass do."""
    return x.value


@rule(Tensor.to)
def _to(x: Dual, *where: Any, **given: Any) -> Dual:
    stack = x.stack.to(*where, **given)
    if not stack.is_floating_point():
        raise NotImplementedError(f"a tensor with tangents cannot become {stack.dtype}: integers have no derivative")
    return Dual(stack)


@rule(Tensor.type_as)
def _type_as(x: Dual, other: Tensor) -> Dual:
    return _to(x, other.dtype)


@rule(Tensor.cpu)
def _cpu(x: Dual) -> Dual:
    return _to(x, "cpu")


@rule(Tensor.float)
def _float(x: Dual) -> Dual:
    return _to(x, torch.float32)


@rule(Tensor.double)
def _double(x: Dual) -> Dual:
    return _to(x, torch.float64)


@rule(Tensor.__getitem__)
def _part(x: Any, index: Any) -> Dual:
    if not isinstance(x, Dual):
        raise NotImplementedError("a tensor with tangents is no index")
    return Dual(x.stack[(slice(None), *(index if isinstance(index, tuple) else (index,)))])


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
    return Dual(torch.cat([stacked(x, like) for x in tensors], _dim(dim)))


@rule(torch.stack)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Dual:
    like = next(x.stack for x in tensors if isinstance(x, Dual))
    return Dual(torch.stack([stacked(x, like) for x in tensors], _dim(dim)))


@rule(torch.where, Tensor.where)
def _where(condition: Tensor, x: Any, y: Any) -> Dual:
    if isinstance(condition, Dual):
        raise NotImplementedError("a tensor with tangents is no condition")
    like = x.stack if isinstance(x, Dual) else y.stack
    mine, other = stacked(x, like), stacked(y, like)
    dims = max(condition.dim(), mine.dim() - 1, other.dim() - 1)
    return Dual(torch.where(condition, aligned(mine, dims), aligned(other, dims)))


def _constant(function: Any) -> None:
    """What is made in a tensor's dtype and place, or in its shape, does not depend on its values."""
    rule(function)(lambda x, *how, **given: function(x.value, *how, **given))


MADE: list[Any] = [Tensor.new_full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_tensor]
MADE += [torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.randn_like]
for _function in MADE:
    _constant(_function)
