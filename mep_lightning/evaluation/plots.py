"""The plots of a run: loss over steps, memory by phase; drawn without pyplot, so no global state and no display."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mep_lightning.errors import human

INK = "#3f3f46"
PARTS = ("weights", "gradients", "optimizer", "activations", "other")
PLANNED = (*PARTS[:4], "buckets", "workspaces")
# Okabe and Ito's palette, told apart with every kind of colour vision and on light and dark ground.
COLORS = {
    "weights": "#0072b2",
    "gradients": "#d55e00",
    "optimizer": "#e69f00",
    "activations": "#009e73",
    "other": "#8b8b94",
    "buckets": "#cc79a7",
    "workspaces": "#8b8b94",
}
CURVE = "#2a8fd6"
BINS = 10
"""Bars of a histogram."""
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words that a line may cross
MARK = "#0b0c0d"  # becomes currentColor in an SVG


def smooth(values: Sequence[float], span: float) -> list[float]:
    """An exponential moving average over about `span` values, unbiased at the start; gaps (NaN) are passed over."""
    decay, total, weight, out = 1 - 1 / max(span, 1), 0.0, 0.0, []
    for value in values:
        if value == value and abs(value) != float("inf"):
            total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight if weight else float("nan"))
    return out


def loss_figure(steps: Sequence[int], losses: Sequence[float], ink: str = INK) -> Figure:
    """The loss of every logged step, faint, and its moving average on top."""
    figure, axes = plain(ink, height=3.0)
    axes.plot(steps, losses, color=CURVE, alpha=0.35, linewidth=0.8, marker="." if len(steps) < 3 else "")
    span = max(len(losses) / 20, 1)
    axes.plot(steps, smooth(losses, span), color=CURVE, linewidth=2)
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel("loss", color=ink)
    axes.grid(axis="y", color=ink, alpha=0.15)
    # A single spike must not flatten the curve that matters.
    finite = sorted(value for value in losses if value == value and abs(value) != float("inf"))
    if len(finite) > 20:
        low, high = finite[0], finite[int(0.995 * (len(finite) - 1))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) or None)
    return figure


def branch_figure(steps: Sequence[int], timesteps: Sequence[float], high: Sequence[bool], ink: str = INK) -> Figure:
    """The share of steps that took the branch of high resolution, over the timestep and over time."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, places, name in zip(figure.subplots(1, 2), (timesteps, steps), ("timestep", "step"), strict=True):
        strip(axes, ink)
        low, width = min(places), max((max(places) - min(places)) / BINS, 1e-9)
        for number in range(BINS):
            taken = [
                h for place, h in zip(places, high, strict=True) if min(int((place - low) / width), BINS - 1) == number
            ]
            if taken:
                share, start = sum(taken) / len(taken), low + number * width
                axes.bar(start, 1, width * 0.92, align="edge", color=COLORS["optimizer"], alpha=0.35)
                axes.bar(start, share, width * 0.92, align="edge", color=CURVE)
        axes.set_ylim(0, 1)
        axes.set_xlabel(name, color=ink)
    figure.axes[0].set_ylabel("share of ZO-high", color=ink)
    return figure


def memory_figure(memory: Mapping[str, Any], ink: str = INK) -> Figure:
    """A bar a phase, stacked by what the memory holds; `memory` is what `memory.json` says."""
    phases: Mapping[str, Any] = memory["phases"]
    figure, axes = plain(ink, height=1.3 + 0.42 * max(len(phases), 1))
    names = list(phases)
    widest = max((phases[name]["peak_bytes"] for name in names), default=0) or 1
    scale, unit = (2**30, "GiB") if widest >= 2**30 else (2**20, "MiB")
    left = [0.0] * len(names)
    for part in PARTS:
        sizes = [phases[name]["breakdown"].get(part, 0) / scale for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=COLORS[part], label=part, height=0.62)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for row, name in enumerate(names):
        top = name == memory.get("peak_phase")
        text = human(phases[name]["peak_bytes"]) + ("  peak" if top else "")
        axes.text(
            left[row] + widest / scale * 0.012, row, text, va="center", color=ink, weight="bold" if top else "normal"
        )
    axes.invert_yaxis()
    axes.set_xlim(0, widest / scale * 1.2)
    axes.set_xlabel(f"{unit} on {memory.get('device', 'unknown')}", color=ink)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, labelcolor=ink, handlelength=1)
    return figure


def plan_figure(rows: Sequence[Any], limit: int | None = None, ink: str = INK) -> Figure:
    """A bar a row of `mep plan`, its highest phase stacked by what the memory holds; a line where the budget ends."""
    figure, axes = plain(ink, height=1.3 + 0.34 * max(len(rows), 1))
    names = [str(row) for row in rows]
    left = [0.0] * len(rows)
    for part in PLANNED:
        sizes = [getattr(row.phases[row.peak_phase], part) / 2**30 for row in rows]
        if not any(sizes):
            continue
        axes.barh(names, sizes, left=left, color=COLORS[part], label=part, height=0.62)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, row in enumerate(rows):
        said, behind = (
            f"{human(row.peak_bytes)}, {row.peak_phase}",
            {"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axes.text(left[place] + max(left) * 0.012, place, said, va="center", color=ink, bbox=behind)
    if limit is not None:
        axes.axvline(limit / 2**30, color=ink, linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.25)
    axes.set_xlabel(f"GiB, {rows[0].base} at {rows[0].resolution} px, beside each its tensors", color=ink)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, labelcolor=ink, handlelength=1)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an inline SVG element whose ink is the page's text colour; `name` keeps its ids its own."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(MARK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([^\s\"')]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", svg)
    svg = re.sub(r"font: [^;\"]*;", lambda match: _own_font(match.group()), svg)
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg )', r"\1\2", svg, count=1)


def _own_font(style: str) -> str:
    """Matplotlib's font with the page's family."""
    size = re.search(r"[\d.]+px", style)
    weight = "bold " if "bold" in style or "700" in style else ""
    return f"font: {weight}{size.group() if size else '10px'} system-ui, sans-serif;"


def plain(ink: str, height: float) -> tuple[Figure, Any]:
    """A figure of a page's width with one pair of axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    strip(axes, ink)
    return figure, axes


def strip(axes: Any, ink: str) -> None:
    """Leave an axis at the bottom, in the ink's colour."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink)
        spine.set_alpha(0.4)
    axes.tick_params(colors=ink)
