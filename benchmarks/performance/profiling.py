"""`profile`: where a GPU's time goes in a zeroth-order step at a base's real size, with made-up weights."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.performance import real_step
from benchmarks.rows import Row, interleaved, row

STEPS = 3
"""That are profiled together."""
KERNELS = 12
"""That are told, those that take most."""
LONGEST = 60
"""Letters of a kernel's name."""


def run(base: str, rounds: int = 15, device: str = "cuda") -> list[Row]:
    """For finite differences and tangents, launched one by one and as a graph, a step's seconds, those of them that the
    device is at work, its kernels, and the seconds of the kernels that take most."""
    assert torch.device(device).type == "cuda", "a GPU's kernels are what is profiled"
    rows = []
    for carried in ("", real_step.CARRIED):
        for way, switches in real_step.WAYS["cuda"].items():
            case = f"{base} int8 n=2, {carried}{way}"
            rows += of_step(case, real_step.ours(base, device, carried=bool(carried), **switches), rounds)
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def of_step(case: str, step: Callable[[], object], rounds: int) -> list[Row]:
    """Rows of one way to take a step."""
    seconds = statistics.median(interleaved({"step": step}, rounds)["step"])
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    at_work = sum(event.self_device_time_total for event in events) / STEPS / 1e6
    launches = sum(event.count for event in events) // STEPS
    print(f"{case}: {1e3 * seconds:.1f} ms, {1e3 * at_work:.1f} of them at work, {launches} kernels", flush=True)
    return [
        row("profile", case, "seconds a step", seconds, "s"),
        row("profile", case, "seconds at work", at_work, "s"),
        row("profile", case, "kernels", launches, ""),
        *(
            row(
                "profile",
                case,
                f"{event.count // STEPS} x {event.key[:LONGEST]}",
                event.self_device_time_total / STEPS / 1e6,
                "s",
            )
            for event in events[:KERNELS]
        ),
    ]
