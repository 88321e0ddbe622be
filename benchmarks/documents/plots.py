"""The pictures of docs/, from a suite's rows."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Row
from benchmarks.studies.paths import BUDGET, COMPONENTS, DIMS, MARKS, RUNS
from benchmarks.trained.variants import RANGES
from mep_lightning.comparison.plots import memory_bars, tradeoff

BLUE, GREEN, ORANGE, RED, GREY = "#1b6ca8", "#2a9d5c", "#d9822b", "#b03a48", "#777777"
PATHS = {
    "fp32": (BLUE, "-"),
    "int8, float32 activations": (BLUE, "--"),
    "fp16": (GREEN, "-"),
    "int8, float16 activations": (GREEN, "--"),
    "bf16": (ORANGE, "-"),
    "int8, W8A8 linears, float16 activations": (RED, "--"),
}
"""Which precisions are drawn; a dtype of activations has a colour, int8 weights a dashed line."""
CARRIED = {"fp32": BLUE, "fp16": GREEN, "bf16": ORANGE, "int8, W8A8 linears, bfloat16 activations": RED}
"""Whose tangents are drawn beside their finite differences."""
HOLLOWED = "hollowed "
"""What the names of LoRAs around a hollow begin with; their share in percent follows."""
ORDERS = {
    "the gradients' own": (GREY, ":"),
    "the conditioning's Jacobian": (BLUE, "-"),
    "random directions": (ORANGE, "--"),
}
"""Which directions are counted first, and how their curves are drawn."""


def fidelity(rows: list[Row]) -> Figure:
    """Relative errors of finite differences over mu, one line a precision."""
    figure, axes = _figure(8, 4.5)
    for name, (colour, style) in PATHS.items():
        axes.plot(*_curve(rows, f"tiny {name} mu ", "rounding"), style, color=colour, marker="o", label=name)
    axes.plot(*_curve(rows, "tiny fp32 mu ", "truncation"), ":", color="black", label="truncation (any precision)")
    axes.axhline(0.05, color="grey", linewidth=0.8)
    axes.text(axes.get_xlim()[0] * 1.1, 0.055, "5 %", color="grey")
    axes.set(xscale="log", yscale="log", xlabel="mu", ylabel="median relative error")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def tangents(rows: list[Row]) -> Figure:
    """How far finite differences are from the derivative over mu, and tangents, which have none, as flat lines."""
    figure, axes = _figure(9.5, 4.5)
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
    return figure


def conditioning(rows: list[Row]) -> Figure:
    """How much of a token's gradient lies in the first k directions, in every order."""
    figure, axes = _figure(8, 4)
    for order, (colour, style) in ORDERS.items():
        found = [row for row in rows if row["case"].startswith(order) and row["metric"] == "of single draws"]
        dims = [int(row["case"].split(", ")[1].split(" ")[0]) for row in found]
        axes.plot(dims, [row["value"] for row in found], style, color=colour, marker="o", label=order)
    axes.set(xlabel="first k of 128 dimensions", ylabel="share of a gradient's squared length", ylim=(0, 1))
    _powers_of_two(axes, [2, 4, 8, 16, 32, 64])
    axes.legend(loc="lower right", frameon=False)
    return figure


def paths(rows: list[Row]) -> Figure:
    """How fast tokens learn (ZOODiP's Figure S5), and in how few dimensions (its Figure 3)."""
    values = {row["case"]: row["value"] for row in rows if row["metric"] == "held-out loss"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, dims = figure.subplots(1, 2)
    for (name, (_, passes)), colour in zip(RUNS.items(), (BLUE, GREY, ORANGE, RED, GREEN), strict=True):
        marks = [mark for mark in MARKS if f"{name}, {mark} forward passes" in values]
        speed.plot(
            marks, [values[f"{name}, {mark} forward passes"] for mark in marks], color=colour, marker="o", label=name
        )
        for what, line in zip(COMPONENTS, ("-", "--"), strict=True):
            if kept := [k for k in DIMS if f"{name}, {k} {what}" in values]:
                losses = [values[f"{name}, {k} {what}"] for k in kept]
                dims.plot(kept, losses, line, color=colour, marker="o", label=f"{name}, {what}")
        assert passes <= BUDGET
    speed.set(xscale="log", xlabel="forward passes (a backward pass counts two)", ylabel="held-out loss")
    dims.set(xlabel="components that a token keeps", ylabel="held-out loss")
    _powers_of_two(dims, list(DIMS))
    start = values[f"textual_inversion, 0 {COMPONENTS[1]}"]
    for axes in (speed, dims):
        axes.axhline(start, color=GREY, linestyle=":", label="where tokens begin")
        axes.grid(alpha=0.25)
    dims.legend(handles=dims.lines[:-1], frameon=False, fontsize=8)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def timesteps(rows: list[Row]) -> Figure:
    """Scores of Textual Inversion over the first and the last timestep that it draws (ZOODiP's Figure 7)."""
    lows, highs = (sorted({int(name.split("..")[i]) for name in RANGES}) for i in (0, 1))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (metric, title) in zip(
        figure.subplots(1, 3), (("clip_t", "CLIP-T"), ("clip_i", "CLIP-I"), ("dino", "DINO")), strict=True
    ):
        values = {row["case"]: row["value"] for row in rows if row["metric"] == metric}
        grid = [[values.get(f"{low}..{high}", float("nan")) for low in lows] for high in reversed(highs)]
        axes.imshow(grid, cmap="viridis", aspect="auto")
        shades = [value for line in grid for value in line if value == value]
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    dark = value < (min(shades) + max(shades)) / 2
                    axes.text(x, y, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(lows)), [str(low) for low in lows])
        axes.set_yticks(range(len(highs)), [str(high) for high in reversed(highs)])
        axes.set(title=title, xlabel="from", ylabel="to below")
    return figure


def hollowed(rows: list[Row]) -> Figure:
    """Scores of a LoRA over the share of the U-Net that is cut out (Hollowed Net's curve), ± the spread over seeds."""
    shares = {
        int(case.removeprefix(HOLLOWED).rstrip("%")): case
        for case in dict.fromkeys(row["case"] for row in rows)
        if case.startswith(HOLLOWED)
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2), (("clip_i", "CLIP-I"), ("dino", "DINO")), strict=True):
        of = {row["case"]: row for row in rows if row["metric"] == metric}
        told = [(share, of[case]) for share, case in sorted(({0: "lora"} | shares).items())]
        places, spreads = [share for share, _ in told], [row["spread"] for _, row in told]
        axes.errorbar(places, [row["value"] for _, row in told], yerr=spreads, color=BLUE, marker="o", capsize=3)
        axes.axhline(of["untrained"]["value"], color=GREY, linestyle=":", label="untrained")
        axes.set(xlabel="of the U-Net's parameters cut out, %", ylabel=title)
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", frameon=False)
    return figure


def compare_memory(rows: list[Row]) -> Figure | None:
    """Peaks of training, a pair of bars a method (ZOODiP's Figure 1a)."""
    from benchmarks.trained.comparison import lines

    return memory_bars(lines(rows))


def compare_quality(rows: list[Row]) -> Figure | None:
    """Image alignment over the peak of training, a point a method (ZOODiP's Figure 1b)."""
    from benchmarks.trained.comparison import lines

    return tradeoff(lines(rows))


PLOTS: dict[str, tuple[str, Callable[[list[Row]], Figure | None]]] = {
    "fidelity": ("fidelity", fidelity),
    "tangents": ("fidelity", tangents),
    "conditioning": ("conditioning", conditioning),
    "paths": ("paths", paths),
    "timesteps": ("timesteps", timesteps),
    "hollowed": ("loras", hollowed),
    "compare_memory": ("compare", compare_memory),
    "compare_quality": ("compare", compare_quality),
}
"""A picture in docs/images -> the suite whose rows it shows, and what draws it."""


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    return figure, axes


def _powers_of_two(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _curve(rows: list[Row], case: str, error: str) -> tuple[list[float], list[float]]:
    found = [row for row in rows if row["case"].startswith(case) and row["metric"].startswith(error)]
    return [float(row["case"].removeprefix(case)) for row in found], [row["value"] for row in found]
