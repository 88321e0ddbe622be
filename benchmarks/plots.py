"""The pictures of docs/, from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

PATHS = {
    "fp32": ("#1b6ca8", "-"),
    "int8, float32 activations": ("#1b6ca8", "--"),
    "fp16": ("#2a9d5c", "-"),
    "int8, float16 activations": ("#2a9d5c", "--"),
    "bf16": ("#d9822b", "-"),
    "int8, W8A8 linears, float16 activations": ("#b03a48", "--"),
}
"""Which precisions are drawn; a dtype of activations has a colour, int8 weights a dashed line."""
CARRIED = {
    "fp32": "#1b6ca8",
    "fp16": "#2a9d5c",
    "bf16": "#d9822b",
    "int8, W8A8 linears, bfloat16 activations": "#b03a48",
}
"""Whose tangents are drawn beside their finite differences."""


def fidelity(figures: Path, picture: Path) -> None:
    """Relative errors of finite differences over mu, one line a precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[Row] = json.loads(figures.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (colour, style) in PATHS.items():
        axes.plot(*_curve(rows, f"tiny {name} mu ", "rounding"), style, color=colour, marker="o", label=name)
    axes.plot(*_curve(rows, "tiny fp32 mu ", "truncation"), ":", color="black", label="truncation (any precision)")
    axes.axhline(0.05, color="grey", linewidth=0.8)
    axes.text(axes.get_xlim()[0] * 1.1, 0.055, "5 %", color="grey")
    axes.set(xscale="log", yscale="log", xlabel="mu", ylabel="median relative error")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def tangents(figures: Path, picture: Path) -> None:
    """How far finite differences are from the derivative over mu, and tangents, which have none, as flat lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[Row] = json.loads(figures.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(9.5, 4.5), layout="constrained")
    for name, colour in CARRIED.items():
        mus, rounding = _curve(rows, f"tiny {name} mu ", "rounding")
        _, truncation = _curve(rows, f"tiny {name} mu ", "truncation")
        axes.plot(mus, [a + b for a, b in zip(rounding, truncation, strict=True)], color=colour, marker="o", label=name)
        (own,) = (
            row["value"] for row in rows if row["case"] == f"tiny {name} tangents" and "rounding" in row["metric"]
        )
        axes.axhline(own, color=colour, linestyle="--", linewidth=1, label=f"{name}, tangents")
    axes.set(xscale="log", yscale="log", xlabel="mu", ylabel="median relative error: rounding + truncation")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


ORDERS = {
    "the gradients' own": ("#777777", ":"),
    "the conditioning's Jacobian": ("#1b6ca8", "-"),
    "random directions": ("#d9822b", "--"),
}
"""Which directions are counted first, and how their curves are drawn."""


def conditioning(figures: Path, picture: Path) -> None:
    """How much of a token's gradient lies in the first k directions, in every order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[Row] = json.loads(figures.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for order, (colour, style) in ORDERS.items():
        found = [row for row in rows if row["case"].startswith(order) and row["metric"] == "of single draws"]
        dims = [int(row["case"].split(", ")[1].split(" ")[0]) for row in found]
        axes.plot(dims, [row["value"] for row in found], style, color=colour, marker="o", label=order)
    axes.set(
        xscale="log", xlabel="first k of 128 dimensions", ylabel="share of a gradient's squared length", ylim=(0, 1)
    )
    axes.set_xticks(ticks := [2, 4, 8, 16, 32, 64], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _curve(rows: list[Row], case: str, error: str) -> tuple[list[float], list[float]]:
    found = [row for row in rows if row["case"].startswith(case) and row["metric"].startswith(error)]
    return [float(row["case"].removeprefix(case)) for row in found], [row["value"] for row in found]


def compare_memory(figures: Path, picture: Path) -> None:
    """Peaks of training, a pair of bars a method (ZOODiP's Figure 1a)."""
    from mep_lightning.comparison.plots import memory_bars

    _save(memory_bars(_compared(figures)), picture)


def compare_quality(figures: Path, picture: Path) -> None:
    """Image alignment over the peak of training, a point a method (ZOODiP's Figure 1b)."""
    from mep_lightning.comparison.plots import tradeoff

    _save(tradeoff(_compared(figures)), picture)


def _compared(figures: Path) -> list[dict[str, Any]]:
    from benchmarks.comparison import lines

    return lines(json.loads(figures.read_text())["rows"])


def _save(figure: Any, picture: Path) -> None:
    if figure is not None:
        figure.savefig(picture, dpi=130)
