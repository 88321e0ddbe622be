"""The meter behind `MemoryProfiler`: peaks of nested phases, from CUDA's counters or from the process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

KINDS = ("weights", "gradients", "optimizer")
WITH_ACTIVATIONS = ("encode", "precompute", "step", "sample")


def tensor_bytes(module: nn.Module, optimizers: Iterable[Any], device: torch.device) -> dict[str, int]:
    """Bytes of the tensors that a run holds on a device, storages shared by several tensors counted once.

    Args:
        module: its parameters and buffers, and those of the modules that its `base` holds outside of it, are weights.
        optimizers: their parameters' gradients and their state.
        device: tensors elsewhere are not counted.

    Returns:
        {"weights", "gradients", "optimizer"}, in bytes.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.device.type != device.type:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    optimizers = list(optimizers)
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    weights = [*_weights(module), *trained]
    return {
        "weights": size(weights),
        "gradients": size(w.grad for w in weights if isinstance(w, Tensor) and w.is_leaf),
        "optimizer": size(
            value for optimizer in optimizers for state in optimizer.state.values() for value in _leaves(state)
        ),
    }


def _leaves(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, dict) else [state]


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module and of what its `base` (no module itself) holds."""
    base = getattr(module, "base", None)
    held = vars(base).values() if hasattr(base, "__dict__") else ()
    for value in (module, base, *held):
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, nn.Module):
                yield from part.parameters()
                yield from part.buffers()


@dataclass
class Peak:
    """The highest figures of a phase, in bytes; `parts` belongs to the moment of `allocated`."""

    allocated: int = 0
    reserved: int = 0
    process: int = 0
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def settle(self, weights: int) -> None:
        """Count weights that the phase made and that found their owner only after its end, as `load_base` does it."""
        room = self.allocated - sum(self.parts.values())
        self.parts["weights"] += max(min(weights - self.parts["weights"], room), 0)


class MemoryMeter:
    """Measures the peak of every phase between `start` and `stop`; phases nest and repeat.

    Time is cut into segments at every `enter` and `exit`. A segment's peak goes to all phases open in it, so an outer
    phase includes its inner ones, and with it goes what was counted at the segment's ends (and at every `note`).

    Args:
        device: CUDA's own counters are read there; anywhere else the process's memory.
        count: what is known to be held now, {"weights", "gradients", "optimizer"} in bytes.
        interval: seconds between readings of the process's memory, where no kernel keeps its high-water mark.
    """

    def __init__(self, device: torch.device, count: Callable[[], dict[str, int]], interval: float = 0.01) -> None:
        self.device = device
        self._count = count
        self._source: _Cuda | _Process
        if device.type == "cuda":
            self._source = _Cuda(device)
        else:
            self._source = _Process() if _Process.is_readable() else _PolledProcess(interval)
        self._open: list[str] = []
        self._phases: dict[str, Peak] = {}
        self._known = dict.fromkeys(KINDS, 0)
        self._closed: list[Peak] = []
        self._baseline = self._process_peak = 0
        self.peak, self.peak_phase = 0, ""

    def start(self) -> None:
        """Begin; what the process holds now beyond the counted tensors is the baseline, not the run's."""
        gc.collect()  # an earlier run's module and Trainer hold each other; freed later, they would hide what is taken
        self._known = self._count()
        self._baseline = self._source.start(sum(self._known.values()))

    def stop(self) -> None:
        """End all phases and the readings."""
        while self._open:
            self.exit(self._open[-1])
        self._cut()
        self._source.stop()

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._cut()
        if not self._open:
            self._source.tidy()
        self._open.append(name)
        self._phases.setdefault(name, Peak())

    def exit(self, name: str) -> None:
        """The phase ends that was opened last under this name."""
        if name not in self._open:
            return
        self._cut()
        del self._open[len(self._open) - 1 - self._open[::-1].index(name)]
        self._closed.append(self._phases[name])

    def note(self) -> None:
        """Count again inside a segment, where more is held than at its ends (gradients before a step)."""
        for kind, size in self._count().items():
            self._known[kind] = max(self._known[kind], size)

    def summary(self) -> dict[str, Any]:
        """The figures so far, as `memory.json` holds them."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "phases": {name: _figures(name, peak) for name, peak in self._phases.items()},
            "peak_bytes": self.peak,
            "peak_phase": self.peak_phase,
            "process_peak": self._process_peak,
            "baseline_bytes": self._baseline,
        }

    def _cut(self) -> None:
        """End a segment: charge its peak to the open phases, begin the next."""
        at_end = self._count()
        known = {kind: max(self._known[kind], at_end[kind]) for kind in KINDS}
        for peak in self._closed:
            peak.settle(at_end["weights"])
        self._closed.clear()
        self._known = at_end
        allocated, reserved, process = self._source.peak()
        self._process_peak = max(self._process_peak, process)
        # Tensors that are there are allocated, also where the process's pages do not show them (mapped, swapped).
        allocated = max(allocated, sum(known.values()))
        for name in set(self._open):
            peak = self._phases[name]
            if allocated > peak.allocated:
                peak.allocated, peak.parts = allocated, known
            peak.reserved = max(peak.reserved, reserved, allocated)
            peak.process = max(peak.process, process)
        if self._open and allocated > self.peak:
            self.peak, self.peak_phase = allocated, self._open[-1]


def _figures(name: str, peak: Peak) -> dict[str, Any]:
    rest = peak.allocated - sum(peak.parts.values())
    active = name in WITH_ACTIVATIONS
    return {
        "peak_bytes": peak.allocated,
        "allocated_peak": peak.allocated,
        "reserved_peak": peak.reserved,
        "process_peak": peak.process,
        "breakdown": peak.parts | {"activations": rest if active else 0, "other": 0 if active else rest},
    }


class _Cuda:
    """CUDA's counters, reset at the start of every segment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, held: int) -> int:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(self.device)
        return 0

    def peak(self) -> tuple[int, int, int]:
        """(allocated, reserved, process) of the segment that ends now."""
        allocated = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        outside = max(total - free - torch.cuda.memory_reserved(self.device), 0)  # context and libraries
        torch.cuda.reset_peak_memory_stats(self.device)
        return allocated, reserved, reserved + outside

    def tidy(self) -> None:
        """Cached blocks stay: giving them back would cost the run time."""

    def stop(self) -> None:
        """Nothing to stop."""


class _Process:
    """The process's resident memory on Linux: the kernel's high-water mark, reset for every segment."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5)
    _baseline = 0

    @classmethod
    def is_readable(cls) -> bool:
        """Whether the kernel keeps a mark and lets us reset it: not off Linux, nor in a container that locks it."""
        try:
            return cls().take() > 0
        except (OSError, IndexError):
            return False

    def take(self) -> int:
        """The most held since the last call, in bytes; the mark falls to what is held now."""
        mark = int(self.STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
        self.RESET.write_text("5")
        return mark

    def start(self, held: int) -> int:
        self.tidy()
        self._baseline = max(self.take() - held, 0)
        return self._baseline

    def peak(self) -> tuple[int, int, int]:
        """(allocated, reserved, process) of the segment that ends now."""
        highest = self.take()
        allocated = max(highest - self._baseline, 0)
        return allocated, allocated, highest

    def tidy(self) -> None:
        """Let the C allocator return what is free, so that a phase is not charged for what an earlier one freed."""
        if sys.platform == "linux":
            with contextlib.suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)
        self.take()

    def stop(self) -> None:
        """Nothing to stop."""


class _PolledProcess(_Process):
    """Everywhere else: a thread reads what is held every `interval` seconds; a peak between two readings is missed."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._process = psutil.Process()
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)

    def take(self) -> int:
        """The most read since the last call, in bytes."""
        now = self._now()
        highest, self._highest = max(self._highest, now), now
        return highest

    def start(self, held: int) -> int:
        self._thread.start()
        return super().start(held)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self._highest = max(self._highest, self._now())

    def _now(self) -> int:
        return int(self._process.memory_info().rss)
