"""The plots of a comparison: memory by method (as ZOODiP's Figure 1a), and what it buys (as its Figure 1b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from mep_lightning.comparison.table import is_batched
from mep_lightning.errors import human
from mep_lightning.evaluation.plots import COLORS, CURVE, INK, plain, strip

Row = Mapping[str, Any]


def memory_bars(rows: Sequence[Row], ink: str = INK) -> Figure | None:
    """Planned and measured peaks of training, a pair of bars a method; None where nothing is known."""
    known = [row for row in rows if row["training_planned"] or row["training_bytes"]]
    if not known:
        return None
    figure, axes = plain(ink, height=1.2 + 0.5 * len(known))
    widest = max(max(row["training_planned"] or 0, row["training_bytes"] or 0) for row in known)
    scale, unit = _unit(widest)
    for offset, key, color, label in (
        (-0.2, "training_planned", COLORS["weights"], "planned"),
        (0.2, "training_bytes", COLORS["optimizer"], "measured"),
    ):
        sizes = [(row[key] or 0) / scale for row in known]
        places = [place + offset for place in range(len(known))]
        axes.barh(places, sizes, height=0.36, color=color, label=label)
        for place, size, row in zip(places, sizes, known, strict=True):
            if row[key]:
                axes.text(size + 0.012 * widest / scale, place, human(row[key]), va="center", color=ink, fontsize=8)
    axes.set_yticks(range(len(known)), [_name(row) for row in known])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * widest / scale)
    axes.set_xlabel(f"{unit} at the peak of training", color=ink)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, labelcolor=ink, handlelength=1)
    return figure


def _name(row: Row) -> str:
    """A method, and how many of its cells share the memory that is drawn."""
    return f"{row['method']}, {row['batch']} a batch" if is_batched(row) else row["method"]


def _unit(widest: int) -> tuple[int, str]:
    return (2**30, "GiB") if widest >= 2**30 else (2**20, "MiB")


def tradeoff(rows: Sequence[Row], ink: str = INK) -> Figure | None:
    """Image alignment over the peak of training, a point a method; None where nothing is known."""
    known = [row for row in rows if row["clip_i"] is not None and (row["training_planned"] or row["training_bytes"])]
    if not known:
        return None
    known = sorted(known, key=lambda row: row["training_planned"] or row["training_bytes"])
    scale, unit = _unit(max(row["training_planned"] or row["training_bytes"] for row in known))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, key, name in zip(figure.subplots(1, 2), ("clip_i", "dino"), ("CLIP-I", "DINO"), strict=True):
        strip(axes, ink)
        sizes = [(row["training_planned"] or row["training_bytes"]) / scale for row in known]
        scores = [row[key] for row in known]
        spreads = [row["spread"].get(key) or 0.0 for row in known]
        axes.errorbar(sizes, scores, yerr=spreads, fmt="o", color=CURVE, ecolor=CURVE, elinewidth=1, markersize=5)
        for place, (row, size, score) in enumerate(zip(known, sizes, scores, strict=True)):
            beside = (5, 4 if place % 2 else -11)  # neighbours' names do not meet
            axes.annotate(_name(row), (size, score), beside, textcoords="offset points", color=ink, fontsize=7.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel(f"{unit} at the peak of training", color=ink)
        axes.set_ylabel(name, color=ink)
        axes.grid(color=ink, alpha=0.12)
    return figure
