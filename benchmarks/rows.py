"""The form every suite's results have, and the interleaved timing that comparisons use."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def row(
    suite: str,
    case: str,
    metric: str,
    value: float,
    unit: str,
    baseline: float | None = None,
    ratio: float | None = None,
) -> Row:
    """One measured figure; `baseline` is that of what it is compared with, `ratio` how much better ours is."""
    return {
        "suite": suite,
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
    }


def device_name(device: str = "cpu", threads: int | None = None) -> str:
    """What a figure was measured on: the GPU's name, or the CPU's with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    count = threads or torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {count} thread{'' if count == 1 else 's'}"


def commit() -> str:
    """The checkout's commit; a + says that its code was changed since."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = ["--", ".", ":!results", "../mep_lightning"]
        changed = subprocess.run([*here, "status", "--short", *code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def measured_with(device: str = "cpu", threads: int | None = None) -> dict[str, str]:
    """Where, with what and when a figure was measured."""
    return {
        "device": device_name(device, threads),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def write(rows: Iterable[Row], path: Path, about: dict[str, str]) -> None:
    """Rows and what `measured_with` says of them; until the last has come, those there are, in FILE.partial.json."""
    partial, found = path.with_suffix(".partial.json"), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for one in rows:
        found.append(one)
        partial.write_text(_written(found, about))
    partial.unlink(missing_ok=True)
    path.write_text(_written(found, about))


def _written(rows: list[Row], about: dict[str, str]) -> str:
    return json.dumps(about | {"rows": rows}, indent=1) + "\n"


def interleaved(sides: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each side, run in turn so that a noisy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
