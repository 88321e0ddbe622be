"""What operations on fake tensors answer, remembered by what they were asked: a rehearsal asks the same over and over.

`FakeTensorMode` remembers too, but looks at so much before it answers that most of a rehearsal's time went there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Kinds of arguments that are told apart by their values."""
DEVICE = torch.ops.prim.device.default
"""Asked of every tensor that an operation looks at, more often than all else together."""
_ASK = object()
"""In the place of an answer that may be another the next time."""
_MISSING = object()


class _Unknown(Exception):
    """An argument that no answer is remembered by."""


@dataclass(frozen=True)
class _Made:
    """A tensor of an answer. It shares the storage of the `source`-th tensor that was asked, or has one of its own.

    Attributes:
        shape, stride, offset, dtype, device: as tensors have them.
        source: None where it has a storage of its own.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None


@dataclass(frozen=True)
class _Same:
    """The `source`-th tensor that was asked, as operations in place answer."""

    source: int


class Answers:
    """Answers operations on the fake tensors of a mode as the mode does, in less time.

    Shapes, strides, dtypes and the sharing of storages are those of the first time. What is not certain to be the same
    is asked every time: real tensors, constants, complex numbers, sparse ones, those of inference mode, operations that
    reshape an argument.
    It is for fakes of a CPU, without symbolic shapes and under the same backend flags throughout.

    Args:
        mode: which is active while operations are answered.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `func(*args, **kwargs)` answers."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].device
        tensors: list[FakeTensor] = []
        try:
            key = _question(func, args, kwargs, tensors)
        except _Unknown:
            return func(*args, **kwargs)
        answer = self._known.get(key, _MISSING)
        if answer is _MISSING:
            result = func(*args, **kwargs)
            changed = torch.Tag.inplace_view in func.tags or _changed(key, func, args, kwargs)
            self._known[key] = _ASK if changed else _described(result, tensors)
            return result
        return func(*args, **kwargs) if answer is _ASK else self._built(answer, tensors)

    def _built(self, answer: Any, tensors: Sequence[FakeTensor]) -> Any:
        kind = type(answer)
        if kind is _Made:
            return self._tensor(answer, tensors)
        if kind is _Same:
            return tensors[answer.source]
        if kind is tuple or kind is list:
            return kind(self._built(one, tensors) for one in answer)
        return answer

    def _tensor(self, made: _Made, tensors: Sequence[FakeTensor]) -> FakeTensor:
        with no_dispatch():
            if made.source is None:
                here = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            else:
                here = torch.empty(0, dtype=made.dtype, device="meta")
                here.set_(tensors[made.source].untyped_storage(), made.offset, made.shape, made.stride)
        return FakeTensor(self.mode, here, made.device)


def _question(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any], tensors: list[FakeTensor]) -> tuple[Any, ...]:
    """What an answer depends on; fake tensors among the arguments are added to `tensors`.

    Raises:
        _Unknown: there is more that it may depend on.
    """
    if type(func) is not OpOverload or torch.is_inference_mode_enabled():
        raise _Unknown
    key: list[Any] = [func, torch.get_default_dtype()]
    _look(args, key, tensors)
    for name, value in kwargs.items():
        key.append(name)
        _look((value,), key, tensors)
    if len(tensors) > 1:  # which of them are one tensor, and which share a storage
        key += map([id(one) for one in tensors].index, map(id, tensors))
        storages = [one.untyped_storage()._cdata for one in tensors]
        key += map(storages.index, storages)
    return tuple(key)


def _look(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> None:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if _is_odd(value):
                raise _Unknown
            tensors.append(value)
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in PLAIN:
            if kind is float and math.isnan(value):  # equal to nothing that is known
                raise _Unknown
            key += (kind, value)
        elif kind is tuple or kind is list:
            key += (kind, len(value))
            _look(value, key, tensors)
        elif kind is torch.Generator:
            key.append(kind)
        else:
            raise _Unknown


def _is_odd(value: FakeTensor) -> bool:
    """Whether there is more to a tensor than what is looked at."""
    is_plain = value.layout is torch.strided and not value.dtype.is_complex
    return value.constant is not None or not is_plain or value.is_neg() or value.is_inference()


def _changed(key: tuple[Any, ...], func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation left its arguments with another shape or storage than they had."""
    try:
        return _question(func, args, kwargs, []) != key
    except _Unknown:
        return True


def _described(result: Any, tensors: Sequence[FakeTensor]) -> Any:
    """How to build an answer again; `_ASK` where that is not certain."""
    storages: dict[int, int | None] = {}
    for i, one in enumerate(tensors):
        storages.setdefault(one.untyped_storage()._cdata, i)
    try:
        return _description(result, tensors, storages)
    except _Unknown:
        return _ASK


def _description(value: Any, tensors: Sequence[FakeTensor], storages: dict[int, int | None]) -> Any:
    """Of a part of an answer; `storages` says whose they are, and learns those that are new (None).

    Raises:
        _Unknown: the next answer may be another, or cannot be built.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_description(one, tensors, storages) for one in value)
    if value is None or kind in (int, float, bool):
        return value
    if kind is not FakeTensor or _is_odd(value):
        raise _Unknown
    same = next((i for i, one in enumerate(tensors) if value is one), None)
    if same is not None:
        return _Same(same)
    if value.requires_grad:
        raise _Unknown
    storage = value.untyped_storage()
    source = storages.get(storage._cdata)
    if source is None and (storage._cdata in storages or not _fills(value)):
        raise _Unknown
    storages.setdefault(storage._cdata, None)
    shape, stride = tuple(value.shape), value.stride()
    return _Made(shape, stride, value.storage_offset(), value.dtype, value.fake_device, source)


def _fills(value: Tensor) -> bool:
    """Whether a tensor takes up its storage, as one does that was made alone."""
    elements = 0
    if 0 not in value.shape:
        elements = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return value.storage_offset() == 0 and value.untyped_storage().nbytes() == elements * value.element_size()
