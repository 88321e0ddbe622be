"""The plots of a comparison: memory by method (as ZOODiP's Figure 1a), and what it buys (as its Figure 1b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from mep_lightning.comparison.table import is_batched
from mep_lightning.errors import human
from mep_lightning.evaluation.plots import COLORS, CURVE, INK, plain, strip

Row = Mapping[str, Any]
PEAKS = {"training_planned": "planned", "training_bytes": "measured"}
"""A row's peaks of training -> what they are."""


def memory_bars(rows: Sequence[Row], ink: str = INK) -> Figure | None:
    """Planned and measured peaks of training, a pair of bars a method; None where nothing is known."""
    known = [row for row in rows if row["training_planned"] or row["training_bytes"]]
    if not known:
        return None
    figure, axes = plain(ink, height=1.2 + 0.5 * len(known))
    widest = max(max(row["training_planned"] or 0, row["training_bytes"] or 0) for row in known)
    scale, unit = _unit(widest)
    for offset, (key, label), color in zip((-0.2, 0.2), PEAKS.items(), ("weights", "optimizer"), strict=True):
        sizes = [(row[key] or 0) / scale for row in known]
        places = [place + offset for place in range(len(known))]
        axes.barh(places, sizes, height=0.36, color=COLORS[color], label=label)
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
    """Alignment with photos and prompts over the peak of training, a point a method; None where nothing is known.

    The peak is the planned one, or the measured one where more methods have that; a method without it has no point.
    """
    scored = [row for row in rows if row["clip_i"] is not None]
    peak = max(PEAKS, key=lambda key: sum(bool(row[key]) for row in scored))
    known = sorted((row for row in scored if row[peak]), key=lambda row: row[peak])
    if not known:
        return None
    scale, unit = _unit(max(row[peak] for row in known))
    drawn = {"clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T"}
    figure = Figure(figsize=(4 * len(drawn), 3.4), layout="constrained")
    panels = list(figure.subplots(1, len(drawn)))
    sizes = [row[peak] / scale for row in known]
    for axes, (key, name) in zip(panels, drawn.items(), strict=True):
        strip(axes, ink)
        scores = [row[key] for row in known]
        spreads = [row["spread"].get(key) or 0.0 for row in known]
        axes.errorbar(sizes, scores, yerr=spreads, fmt="o", color=CURVE, ecolor=CURVE, elinewidth=1, markersize=5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel(f"{unit} at the peak of training, {PEAKS[peak]}", color=ink)
        axes.set_ylabel(name, color=ink)
        axes.grid(color=ink, alpha=0.12)
    figure.draw_without_rendering()  # from here on it is known where points lie
    for axes, key in zip(panels, drawn, strict=True):
        points = [(size, row[key]) for size, row in zip(sizes, known, strict=True) if row[key] is not None]
        _name_points(axes, points, [_name(row) for row in known if row[key] is not None], ink)
    return figure


SIDES = (("left", 5, 4), ("left", 5, -11), ("right", -5, 4), ("right", -5, -11))
"""Of a point, where its name may begin or end, and how many points (of type) to the right and up."""
FARTHER = tuple((side, x, y + 11 * (1 if y > 0 else -1)) for side, x, y in SIDES)
"""Where it may be besides, with a line to its point, where all of those meet what is there."""


def _name_points(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], ink: str) -> None:
    """Write every point's name on that of its sides where it meets least of what is there."""
    around = [Bbox.from_bounds(x - 10, y - 10, 20, 20) for x, y in axes.transData.transform(points)]
    written: list[Bbox] = []
    for number, (point, name) in enumerate(zip(points, names, strict=True)):
        taken = [*around[:number], *around[number + 1 :], *written]
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": ink,
            "alpha": 0.4,
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 2,
        }
        written_as: dict[str, Any] = {"textcoords": "offset points", "color": ink, "fontsize": 7.5}
        tried = [axes.annotate(name, point, (x, y), ha=side, **written_as) for side, x, y in SIDES]
        tried += [axes.annotate(name, point, (x, y), ha=side, **written_as, arrowprops=line) for side, x, y in FARTHER]
        boxes = [extent(text) for text in tried]
        met = [sum(_shared(box, other) for other in taken) - _shared(box, axes.bbox) for box in boxes]
        best = met.index(min(met))
        for place, text in enumerate(tried):
            if place != best:
                text.remove()
        written.append(boxes[best])


def extent(text: Annotation) -> Bbox:
    """Where a point's name lies, without the line to it."""
    text.get_window_extent()  # which puts it where its point is
    return Text.get_window_extent(text)


def _shared(one: Bbox, other: Bbox) -> float:
    """The area of both."""
    inside = Bbox.intersection(one, other)
    return 0.0 if inside is None else inside.width * inside.height
