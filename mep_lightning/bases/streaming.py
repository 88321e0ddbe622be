"""Weights that wait in host memory and visit the device one layer after the other, ahead of their use.

Layers are those modules that own tensors. Which is called after which is remembered: from the second pass on the coming
ones are copied while the present one computes, through an arena a few layers large. All members of a zeroth-order step
share one pass, so the weights cross over once a step, or with `members_at_once` once a portion. A backward pass calls
for them again: with every unit checkpointed they cross over three times in all.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep_lightning.bases.frugal import BlockwiseFeedForward
from mep_lightning.errors import UserError, human
from mep_lightning.quantization import QuantizedWeight

ALIGNMENT = 256
"""Bytes; what cuBLAS and cuDNN like their operands to begin at."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mep-lightning"
LAYERS_AHEAD = 2
"""The arena holds so many of the largest layer; smaller ones fit many times."""


@dataclass(eq=False)
class Layer:
    """A module's own tensors, one after the other in a stretch of host memory.

    Attributes:
        module: that computes with them.
        host: uint8 [size], pinned where the device is a GPU.
        places: for each tensor whose it is, whether it is a parameter, its name, its offset in bytes, and what it looks
            like.
    """

    module: nn.Module
    host: Tensor
    places: list[tuple[nn.Module, bool, str, int, Tensor]]

    @property
    def size(self) -> int:
        return self.host.numel()

    def put(self, memory: Tensor) -> None:
        """Let the module's tensors lie in `memory`, uint8 [size]."""
        for owner, is_parameter, name, offset, like in self.places:
            flat = memory[offset : offset + like.numel() * like.element_size()].view(like.dtype)
            value = flat.as_strided(like.shape, like.stride())
            if is_parameter:
                owner._parameters[name].data = value  # type: ignore[union-attr]
            else:
                owner._buffers[name] = value


Key = tuple[Layer, object]
"""A layer and what calls it: "forward", "again" (a checkpoint's recomputation) or the module whose derivative it is."""


@dataclass(eq=False)
class Visit:
    """A layer in the arena.

    Attributes:
        key: which, and for what.
        start, stop: its stretch of the arena, in bytes.
        arrived: CUDA event, when its copy is complete; None on a CPU.
        done: whether its computation was begun, or will never be.
        used: CUDA event, when that computation ends.
    """

    key: Key
    start: int
    stop: int
    arrived: Any
    done: bool = False
    used: Any = None


class Stream:
    """The layers of a frozen module on the CPU, computing on a device through an arena there.

    Embeddings are not streamed: they stay on the host for good and look up there. What a module owns beside layers of
    its own, and layers without a matrix, stay on the device. A backward pass fetches each weight that it needs again,
    so autograd keeps none; whether activations are kept is the caller's to decide.

    Args:
        module: on the CPU, frozen.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        allocate = partial(torch.empty, dtype=torch.uint8, pin_memory=on_gpu)
        layers, staying = _split(module)
        for part in staying:
            part._apply(partial(torch.Tensor.to, device=device), recurse=False)
        self.layers = _stage(layers, allocate)
        size = LAYERS_AHEAD * max(layer.size for layer in self.layers)
        self.arena = torch.empty(size, dtype=torch.uint8, device=device)
        self._copying = torch.cuda.Stream(device) if on_gpu else None
        if self._copying is not None:  # the arena's memory may have been another's a moment ago, and will be again
            self._copying.wait_stream(torch.cuda.current_stream(device))
            self.arena.record_stream(self._copying)
        self._follows: dict[Key, Key] = {}  # which layer was called after which, the last time
        self._now: Key | None = None
        self._visits: deque[Visit] = deque()
        self._open: Visit | None = None  # that of a backward pass, until the next layer is called for
        self._head = 0
        self._keeping: list[Any] = []
        self._hooks: list[Any] = []
        for layer in self.layers:
            self._hooks.append(layer.module.register_forward_pre_hook(partial(self._before, layer)))
            for owner in {owner: None for owner, *_ in layer.places}:  # each asks for its own weights again
                self._hooks.append(owner.register_forward_pre_hook(partial(self._keep_references, layer)))
                self._hooks.append(owner.register_forward_hook(self._keep_as_before, always_call=True))
            # A checkpoint stops its recomputation inside a layer, when it has all that it needs.
            self._hooks.append(layer.module.register_forward_hook(partial(self._after, layer), always_call=True))
        self._tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        for table in self._tables:
            table.forward = partial(_look_up, table, device)  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave the layers on the host, and give the arena's memory back at once; the rest stays on the device."""
        for handle in self._hooks:
            handle.remove()
        for table in self._tables:
            del table.forward
        self._hooks, self._tables, self.layers = [], [], []
        self._visits.clear()
        self._follows.clear()
        self._now = self._open = None
        self.arena = self.arena.new_empty(0)

    def _before(self, layer: Layer, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The layer is about to compute: have it there."""
        visit = self._arrive((layer, "forward" if torch._C._current_graph_task_id() == -1 else "again"))
        layer.put(self.arena[visit.start : visit.stop])

    def _after(self, layer: Layer, *_: Any) -> None:
        """The layer computes: its stretch may be overwritten once that ends, and the next ones may come."""
        visit = self._coming()
        assert visit is not None and visit.key[0] is layer
        layer.put(layer.host)
        self._leave(visit)

    # -- autograd ------------------------------------------------------------------------------------------------------

    def _keep_references(self, layer: Layer, owner: nn.Module, _: Any) -> None:
        """What autograd is to keep of the arena is kept as a place in the layer, which will be overwritten."""

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() != self.arena.untyped_storage().data_ptr():
                return tensor
            visit = self._coming()
            assert visit is not None
            offset = tensor.storage_offset() * tensor.element_size() - visit.start
            return layer, owner, offset, tensor.dtype, tensor.shape, tensor.stride()

        keeping = torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)
        keeping.__enter__()
        self._keeping.append(keeping)

    def _keep_as_before(self, *_: Any) -> None:
        if self._keeping:
            self._keeping.pop().__exit__(None, None, None)

    def _unpack(self, kept: Any) -> Tensor:
        """A weight that a backward pass asks for: where it lies now."""
        if isinstance(kept, Tensor):
            return kept
        layer, owner, offset, dtype, shape, stride = kept
        if self._open is None or self._open.key[0] is not layer:
            self._open = self._arrive((layer, owner))
        memory = self.arena[self._open.start : self._open.stop]
        return memory[offset:][: _span(shape, stride) * dtype.itemsize].view(dtype).as_strided(shape, stride)

    # -- the arena -----------------------------------------------------------------------------------------------------

    def _arrive(self, key: Key) -> Visit:
        """The layer in the arena, its copy complete as far as the device's order of work goes."""
        if self._open is not None:
            visit, self._open = self._open, None
            self._leave(visit)
        if self._now is not None:
            self._follows[self._now] = key
        self._now = key
        coming = self._coming()
        visit = coming if coming is not None and coming.key == key else self._surprise(key)
        if visit.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(visit.arrived)
        return visit

    def _leave(self, visit: Visit) -> None:
        """What reads the layer is under way: the next ones may come."""
        visit.done = True
        if self._copying is not None:
            visit.used = torch.cuda.current_stream(self.device).record_event()
        while (following := self._follows.get(self._visits[-1].key)) and self._fetch(following):
            pass

    def _coming(self) -> Visit | None:
        """What is in the arena for the next computation."""
        return next((visit for visit in self._visits if not visit.done), None)

    def _surprise(self, key: Key) -> Visit:
        """Another layer than was expected, as in the first pass: forget what has come too early and fetch this one."""
        for early in self._visits:
            early.done, early.used = True, early.used or early.arrived
        visit = self._fetch(key)
        assert visit is not None  # the arena is larger than any layer, and nothing in it is waited for
        return visit

    def _fetch(self, key: Key) -> Visit | None:
        """Begin to copy a layer; None where the arena has no room yet."""
        layer, _ = key
        start = self._head if self._head + layer.size <= self.arena.numel() else 0
        stop = start + layer.size
        blocking = [visit for visit in self._visits if visit.start < stop and start < visit.stop]
        if any(not visit.done for visit in blocking):
            return None
        target, arrived = self.arena[start:stop], None
        if self._copying is None:
            target.copy_(layer.host)
        else:
            with torch.cuda.stream(self._copying):
                for visit in blocking:
                    if visit.used is not None:
                        self._copying.wait_event(visit.used)
                target.copy_(layer.host, non_blocking=True)
                arrived = self._copying.record_event()
        visit = Visit(key, start, stop, arrived)
        self._visits = deque([*(other for other in self._visits if other not in blocking), visit])
        self._head = stop
        return visit


def map_to_disk(module: nn.Module) -> None:
    """Move a module's tensors into a file mapped into memory, so that the system may drop them where memory is short.

    The file lies in the user's cache folder and loses its name before anything is in it: it is gone with the process,
    however that ends.

    Raises:
        UserError: the disk does not hold them.
    """
    layers, staying = _split(module)
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    _stage([*layers, *staying, *embeddings], _map_file)


def _map_file(size: int) -> Tensor:
    """So many bytes of a file that has no name any more, uint8 [size]."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE, prefix="weights-", delete=False) as file:
        try:
            file.truncate(size)
            mapped = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        finally:
            os.unlink(file.name)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told here, not by a dead process
        except OSError as error:  # names no file
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, error.strerror, str(CACHE)) from None
            raise UserError(
                f"{CACHE}: the disk is full, and model.offload stream keeps {human(size)} of weights there: make room, "
                "or set XDG_CACHE_HOME to a folder on another disk"
            ) from None
    return mapped


def streamed_bytes(module: nn.Module) -> int:
    """What a module takes on its device once it is streamed: its arena, and what stays."""
    layers, staying = _split(module)
    stay = sum(value.numel() * value.element_size() for part in staying for *_, value in _own(part))
    return LAYERS_AHEAD * max(_size(layer) for layer in layers) + stay


def _split(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers to stream, and those modules whose own tensors stay on the device as they have such layers inside."""
    within = {inner for part in module.modules() if isinstance(part, BlockwiseFeedForward) for inner in part.modules()}
    within -= {part for part in within if isinstance(part, BlockwiseFeedForward)}
    owners = [part for part in module.modules() if _own(part) and part not in within]
    owners = [part for part in owners if not isinstance(part, nn.Embedding)]
    small = [part for part in owners if not any(_is_large(owner, value) for owner, *_, value in _own(part))]
    staying = [part for part in owners if any(inner in owners for inner in part.modules() if inner is not part)]
    staying += [part for part in small if part not in staying]
    return [part for part in owners if part not in staying], staying


def _is_large(owner: nn.Module, value: Tensor) -> bool:
    """Whether a tensor is a weight, which has several dimensions, or one where it is packed."""
    return value.dim() > 1 or isinstance(owner, QuantizedWeight)


def _size(module: nn.Module) -> int:
    """Bytes of a module's own tensors, each aligned."""
    return sum(_aligned(value) for *_, value in _own(module))


def _aligned(value: Tensor) -> int:
    return -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT


def _own(part: nn.Module) -> list[tuple[nn.Module, bool, str, Tensor]]:
    """The tensors that come and go with a module: whose each is, whether it is a parameter, and its name.

    A feed-forward layer calls its parts once for every block of rows, and is one layer with all that is in it.
    """
    owners = part.modules() if isinstance(part, BlockwiseFeedForward) else [part]
    return [
        (owner, is_parameter, name, value)
        for owner in owners
        for is_parameter, tensors in (
            (True, owner.named_parameters(recurse=False)),
            (False, owner.named_buffers(recurse=False)),
        )
        for name, value in tensors
    ]


def _stage(modules: Sequence[nn.Module], allocate: Callable[[int], Tensor]) -> list[Layer]:
    """Bring modules' tensors together in host memory, one stretch a module; `allocate` gives so many bytes of it."""
    plans = []
    for module in modules:
        places, size = [], 0
        for owner, is_parameter, name, value in _own(module):
            places.append((owner, is_parameter, name, size, torch.empty_like(value, device="meta")))
            size += _aligned(value)
        plans.append((module, places, size))
    host = allocate(sum(size for *_, size in plans))
    layers = []
    for (module, places, _), stretch in zip(plans, host.split([size for *_, size in plans]), strict=True):
        values = [value.detach() for *_, value in _own(module)]
        layer = Layer(module, stretch, places)
        layer.put(stretch)
        for (*_, target), value in zip(_own(module), values, strict=True):
            target.detach().copy_(value)
        layers.append(layer)
    return layers


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _look_up(embedding: nn.Embedding, device: torch.device, ids: Tensor) -> Tensor:
    """Rows of a table that stays on the host. ids int64 [...] -> [..., D] on the device."""
    return F.embedding(ids.cpu(), embedding.weight).to(device)
