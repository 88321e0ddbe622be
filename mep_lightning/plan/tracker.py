"""Counting the bytes that tensors hold while code runs, real ones or fake ones that hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def operate(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operation answers."""
    return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its release.

    Tensors on the meta device hold nothing. Views and in-place results share a storage and count once. What an
    operation allocates and frees inside itself is not seen; `inside` may say how much that is.

    Args:
        inside: an operation and its arguments -> bytes that it holds only while it runs.
        answer: an operation, its arguments and its keywords -> what it answers.

    Attributes:
        now: bytes held by storages that were made, or given to `hold`, since this mode began.
        peak: the most there ever were, since the last `reset_peak`.
    """

    def __init__(
        self,
        inside: Callable[[Any, tuple[Any, ...]], int] = lambda _, __: 0,
        answer: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any] = operate,
    ) -> None:
        super().__init__()
        self.inside, self.answer = inside, answer
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def hold(self, tensors: Any) -> None:
        """Count tensors (a tree of them) that were made elsewhere."""
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tree_iter(tensors):
            if isinstance(tensor, Tensor):
                self._follow(tensor)

    def reset_peak(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = self.now

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while bytes are counted, so that no operation need be kept from the compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.answer(func, args, kwargs or {})
        self.hold(result)
        self.peak = max(self.peak, self.now + self.inside(func, args))
        return result

    def _follow(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
