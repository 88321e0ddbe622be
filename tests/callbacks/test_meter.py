"""Peaks of nested phases: exact where they can be, honest elsewhere, and every tensor counted once."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mep_lightning.callbacks.meter import KINDS, MemoryMeter, _Process, tensor_bytes

MIB = 2**20
CPU = torch.device("cpu")


def block(mebibytes: int) -> torch.Tensor:
    """Memory that is really there: written to; in pages of its own, not in a hole that others left in the heap."""
    return torch.frombuffer(mmap.mmap(-1, mebibytes * MIB), dtype=torch.uint8).fill_(1)


def nothing() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


class Scripted:
    """A source of readings that a test writes: each `peak()` takes the next (allocated, reserved, process)."""

    def __init__(self, readings):
        self.readings = list(readings)

    def peak(self):
        return self.readings.pop(0)

    def tidy(self):
        pass


def scripted(readings, count=nothing) -> MemoryMeter:
    meter = MemoryMeter(CPU, count)
    meter._source = Scripted(readings)
    return meter


def test_an_outer_phase_includes_its_inner_ones_and_the_innermost_has_the_peak():
    meter = scripted([(1, 1, 1), (10, 11, 12), (70, 80, 90), (20, 21, 22), (5, 5, 5)])
    meter.enter("outer")
    meter.enter("inner")
    meter.exit("inner")
    meter.exit("outer")
    figures = meter.summary()
    outer, inner = figures["phases"]["outer"], figures["phases"]["inner"]
    assert (outer["peak_bytes"], outer["reserved_peak"], outer["process_peak"]) == (70, 80, 90)
    assert (inner["peak_bytes"], inner["reserved_peak"], inner["process_peak"]) == (70, 80, 90)
    assert (figures["peak_bytes"], figures["peak_phase"]) == (70, "inner")


def test_what_happens_between_phases_is_nobodys_but_counts_for_the_process():
    meter = scripted([(99, 99, 1000), (7, 8, 9), (50, 50, 50)])
    meter.enter("load")
    meter.exit("load")
    meter.enter("save")
    figures = meter.summary()
    assert figures["phases"]["load"]["peak_bytes"] == 7
    assert figures["peak_bytes"] == 7
    assert figures["process_peak"] == 1000


def test_a_repeated_phase_keeps_its_highest_peak_and_that_moments_parts():
    held = nothing()
    meter = scripted([(0, 0, 0), (50, 0, 0), (0, 0, 0), (40, 0, 0), (0, 0, 0), (60, 0, 0)], lambda: dict(held))
    for weights in (10, 30, 20):
        held["weights"] = weights
        meter._known = dict(held)
        meter.enter("step")
        meter.exit("step")
    step = meter.summary()["phases"]["step"]
    assert step["peak_bytes"] == 60
    assert step["breakdown"] == {"weights": 20, "gradients": 0, "optimizer": 0, "activations": 40, "other": 0}


def test_the_parts_add_up_and_the_rest_is_activations_only_where_there_are_some():
    readings = [(0, 0, 0), (100, 0, 0)] * 3
    meter = scripted(readings, lambda: {"weights": 60, "gradients": 5, "optimizer": 10})
    for name in ("load", "step", "sample"):
        meter.enter(name)
        meter.exit(name)
    for name, figures in meter.summary()["phases"].items():
        parts = figures["breakdown"]
        assert sum(parts.values()) == figures["peak_bytes"] == 100
        assert parts["other" if name == "load" else "activations"] == 25


def test_tensors_that_are_there_are_never_reported_as_less():
    """Pages that were mapped but not touched are missing from the process's memory, yet allocated."""
    meter = scripted([(0, 0, 0), (10, 10, 10)], lambda: {"weights": 64, "gradients": 0, "optimizer": 0})
    meter.enter("load")
    meter.exit("load")
    figures = meter.summary()["phases"]["load"]
    assert figures["peak_bytes"] == figures["allocated_peak"] == 64
    assert figures["reserved_peak"] == 64
    assert figures["breakdown"]["other"] == 0


def test_a_note_counts_what_is_gone_again_at_the_segments_end():
    held = nothing()
    meter = scripted([(0, 0, 0), (100, 0, 0)], lambda: dict(held))
    meter.enter("step")
    held["gradients"] = 30
    meter.note()
    held["gradients"] = 0
    meter.exit("step")
    assert meter.summary()["phases"]["step"]["breakdown"]["gradients"] == 30


@pytest.fixture(params=["kernel", "thread"])
def either_source(request, monkeypatch):
    """The kernel's high-water mark, and the thread that takes its place where there is none."""
    if request.param == "thread":
        monkeypatch.setattr(_Process, "is_readable", lambda: False)
    elif not _Process.is_readable():
        pytest.skip("the kernel keeps no high-water mark that can be reset")


@pytest.mark.usefixtures("either_source")
def test_the_process_memory_of_a_phase_is_measured_with_its_short_peaks():
    meter = MemoryMeter(CPU, nothing, interval=0.002)
    meter.start()
    meter.enter("small")
    kept = block(20)
    meter.exit("small")
    meter.enter("large")
    for _ in range(3):
        gone = block(150)
        time.sleep(0.02)
        del gone
    meter.exit("large")
    meter.enter("after")
    meter.exit("after")
    meter.stop()
    figures = meter.summary()["phases"]
    assert 19 * MIB <= figures["small"]["peak_bytes"] <= 40 * MIB
    assert 168 * MIB <= figures["large"]["peak_bytes"] <= 200 * MIB
    assert figures["after"]["peak_bytes"] <= 50 * MIB  # what was freed is not charged again
    assert figures["large"]["process_peak"] - figures["large"]["peak_bytes"] == meter.summary()["baseline_bytes"]
    assert kept.sum() > 0


@pytest.mark.skipif(not _Process.is_readable(), reason="the kernel keeps no high-water mark that can be reset")
def test_on_linux_no_peak_is_too_short_and_no_thread_runs():
    meter = MemoryMeter(CPU, nothing, interval=3600)
    threads = threading.active_count()
    meter.start()
    assert threading.active_count() == threads
    for size in (150, 100):  # the second is not the process's highest
        meter.enter(f"spike {size}")
        gone = block(size)
        del gone
        meter.exit(f"spike {size}")
    meter.stop()
    for size in (150, 100):
        assert (size - 2) * MIB <= meter.summary()["phases"][f"spike {size}"]["peak_bytes"] <= (size + 15) * MIB


def test_what_the_module_already_held_is_the_runs_and_not_the_baselines():
    weights = block(100)
    meter = MemoryMeter(CPU, lambda: {"weights": 100 * MIB, "gradients": 0, "optimizer": 0})
    meter.start()
    meter.enter("step")
    more = block(50)
    meter.exit("step")
    meter.stop()
    assert 149 * MIB <= meter.summary()["phases"]["step"]["peak_bytes"] <= 165 * MIB
    assert len(more) == 50 * MIB
    assert len(weights) == 100 * MIB


def test_what_an_earlier_run_left_in_cycles_is_not_in_the_baseline():
    earlier = SimpleNamespace(held=block(100))
    earlier.itself = earlier
    del earlier
    meter = MemoryMeter(CPU, nothing)
    meter.start()
    meter.enter("step")
    gc.collect()  # sooner or later it is freed
    more = block(50)
    meter.exit("step")
    meter.stop()
    assert 49 * MIB <= meter.summary()["phases"]["step"]["peak_bytes"] <= 65 * MIB
    assert len(more) == 50 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc_trim")
def test_what_the_allocator_kept_of_an_earlier_phase_is_not_charged_to_the_next():
    meter = MemoryMeter(CPU, nothing)
    meter.start()
    meter.enter("first")
    # Small tensors with one in use above each: freed, they stay in the process until someone asks for their pages.
    small = [torch.ones(60_000, dtype=torch.uint8) for _ in range(3000)]
    small = small[::2]
    meter.exit("first")
    kept = small[::100]
    del small
    meter.enter("second")
    meter.exit("second")
    meter.stop()
    figures = meter.summary()["phases"]
    assert figures["first"]["peak_bytes"] > 80 * MIB
    assert figures["second"]["peak_bytes"] < 20 * MIB
    assert len(kept) == 15


def test_the_reading_thread_ends(monkeypatch):
    monkeypatch.setattr(_Process, "is_readable", lambda: False)
    meter = MemoryMeter(CPU, nothing)
    meter.start()
    assert "memory-meter" in {thread.name for thread in threading.enumerate()}
    meter.stop()
    assert "memory-meter" not in {thread.name for thread in threading.enumerate()}


# -- counting tensors --------------------------------------------------------------------------------------------------


class Base:
    """Holds frozen modules and is none itself."""

    def __init__(self) -> None:
        self.unet, self.text_encoders, self.vae = nn.Linear(10, 10, bias=False), [nn.Linear(5, 5)], None


def test_weights_gradients_and_optimizer_state_are_counted_to_the_byte():
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    module.base = Base()
    module.base.twin = module.base.unet  # the same storage twice
    optimizer = torch.optim.Adam(module[0].parameters())
    own, frozen = (8 * 4 + 4 + 4 * 4) * 4 + 8, (100 + 30) * 4  # batch norm's counter is one int64
    assert tensor_bytes(module, [], CPU) == {"weights": own + frozen, "gradients": 0, "optimizer": 0}
    module(torch.rand(3, 8)).sum().backward()
    optimizer.step()
    counted = tensor_bytes(module, [optimizer], CPU)
    assert counted["weights"] == own + frozen
    assert counted["gradients"] == (8 * 4 + 4 + 4 + 4) * 4
    assert counted["optimizer"] == 2 * (8 * 4 + 4) * 4 + 2 * 4  # two moments, and two steps that are tensors
    assert tensor_bytes(module, [optimizer], torch.device("cuda")) == nothing()


def test_int8_weights_count_one_byte_each():
    module = nn.Module()
    module.register_buffer("weight", torch.zeros(1000, dtype=torch.int8))
    assert tensor_bytes(module, [], CPU)["weights"] == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_peaks_are_the_allocators_own(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.ones(10 * MIB, dtype=torch.uint8, device=device)
    meter = MemoryMeter(device, lambda: {"weights": 10 * MIB, "gradients": 0, "optimizer": 0})
    start = torch.cuda.memory_allocated(device)
    meter.start()
    meter.enter("step")
    gone = torch.ones(100 * MIB, dtype=torch.uint8, device=device)
    del gone
    meter.enter("sample")
    meter.exit("sample")
    meter.exit("step")
    meter.stop()
    figures = meter.summary()["phases"]
    assert figures["step"]["allocated_peak"] == start + 100 * MIB
    assert figures["sample"]["allocated_peak"] == start
    assert figures["step"]["process_peak"] > figures["step"]["reserved_peak"] >= figures["step"]["allocated_peak"]
    assert len(held) == 10 * MIB
