"""The table of a comparison: a row a method, with the mean and the spread of its cells."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mep_lightning.comparison.cells import SCORES
from mep_lightning.errors import human
from mep_lightning.run_folder import kind_of

Record = Mapping[str, Any]
"""A cell's: method, subject, seed and what it came to."""


def _score(value: float) -> str:
    return f"{value:.3f}"


def _size(value: float) -> str:
    return human(round(value))


def _file(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.2f} kB"


def _figure(value: float) -> str:
    return f"{value:.3g}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "clip_t": ("CLIP-T", _score),
    "clip_i": ("CLIP-I", _score),
    "dino": ("DINO", _score),
    "dino_inter": ("DINO inter", _score),
    "training_planned": ("training, planned", _size),
    "training_bytes": ("training", _size),
    "inference_planned": ("drawing, planned", _size),
    "inference_bytes": ("drawing", _size),
    "storage": ("file", _file),
    "steps": ("steps", lambda value: f"{value:.0f}"),
    "steps_per_second": ("steps/s", _figure),
    "minutes": ("minutes", _figure),
    "batch": ("cells a batch", lambda value: f"{value:.0f}"),
    "seconds_per_image": ("s/picture", _figure),
}
"""Key -> what it is called, and how it is written; bytes of memory and files, minutes of training."""
FAILURES = {"memory": "out of memory", "time": "out of time"}
"""A kind of failure -> what a table says of it."""
LARGEST = ("training_bytes", "inference_bytes", "storage", "batch")
"""Those of which the largest is given; of scores the mean and its spread over seeds, and of the others the median."""
GROWN = ("training_bytes", "inference_bytes")
"""Of these the largest batch's, and on a CPU the median: how much freed memory a process keeps is chance."""
MEASURED = (*GROWN, "steps_per_second", "minutes", "seconds_per_image")
"""What hangs on the device: that of the kind on which most cells ran."""
SCORES_LEGEND = (
    "Scores are means over subjects and seeds, ± the standard deviation over seeds of the mean over subjects; times "
    "are medians. CLIP-T, CLIP-I and DINO: higher is better. DINO inter, of pictures of one prompt (of all, where each "
    "has a single one): lower is more diverse."
)
PLANNED_LEGEND = "Planned are a run's tensors, without libraries' workspaces"
MEASURED_LEGEND = {
    "cpu": "measured on a CPU is by how much a cell's process grew, the median of cells",
    "cuda": "measured on a GPU is what torch's allocator had out, the most of all cells",
}
"""What is measured of memory on a kind of device."""
DRAWING_LEGEND = (
    "Drawing is planned for a process that does nothing else, and measured at the end of a training, which still holds "
    "its optimizer."
)
TOGETHER_LEGEND = (
    "Where several cells trained in one batch, the bytes of training are the batch's; minutes and steps/s are each "
    "cell's share."
)
"""What a reader must know of a table with such cells."""
UNEVEN_LEGEND = (
    "Methods do not have the same cells here ({}): their scores are means over different subjects or seeds, which "
    "differ by more than methods do."
)
"""What a reader must know of a table of such methods, which names those that lack any."""


def rows(records: Iterable[Record], methods: Sequence[str], planned: Mapping[str, Record]) -> list[dict[str, Any]]:
    """A row for every method, in their order.

    Args:
        records: of all cells that have one.
        methods: in the table's order.
        planned: `training_planned` and `inference_planned` of methods, in bytes.

    Returns:
        Rows of `method`, `cells`, `failed`, `failures` (kind -> how many), `lacking` (how many subjects and seeds are
        scored of other methods and not of this one), the columns' values (None where nothing is
        known) and, of scores, `spread`: the standard deviation over seeds of the mean over subjects (None of a single
        seed).
    """
    known = list(records)
    scored: dict[str, set[tuple[str, int]]] = {method: set() for method in methods}
    for record in known:
        if record["method"] in scored and "error" not in record:
            scored[record["method"]].add((record["subject"], record["seed"]))
    everywhere = set().union(*scored.values())
    found = []
    for method in methods:
        mine = [record for record in known if record["method"] == method]
        good = [record for record in mine if "error" not in record]
        kinds = Counter(record.get("kind", "failed") for record in mine if "error" in record)
        row: dict[str, Any] = {"method": method, "cells": len(good), "failed": kinds.total(), "failures": dict(kinds)}
        row |= {"lacking": len(everywhere - scored[method]), "spread": {}}
        together = max((record["batch"] for record in good if is_number(record.get("batch"))), default=1)
        as_many = [record for record in good if (record.get("batch") or 1) == together]
        for key in COLUMNS:
            told = [record for record in (as_many if key in GROWN else good) if is_number(record.get(key))]
            if key in MEASURED:
                told = _alike(told)
            values = [record[key] for record in told]
            if key in SCORES:
                row[key], row["spread"][key] = _mean(good, key)
            elif key in planned.get(method, {}):
                row[key] = planned[method][key]
            else:
                grown = key in GROWN and {_kind(record) for record in told} == {"cpu"}
                middle = max if key in LARGEST and not grown else statistics.median
                row[key] = middle(values) if values else None
        found.append(row)
    return found


def _kind(record: Record) -> str:
    """What a cell ran on, "cpu" or "cuda"."""
    return kind_of(record.get("device") or "cuda")


def _alike(records: Sequence[Record]) -> list[Record]:
    """Those of the kind of device that most ran on."""
    kinds = Counter(map(_kind, records)).most_common(1)
    return [record for record in records if _kind(record) == kinds[0][0]]


def _mean(records: Sequence[Record], key: str) -> tuple[float | None, float | None]:
    """The mean over seeds of the mean over subjects, and the standard deviation of the latter."""
    by_seed: dict[int, list[float]] = {}
    for record in records:
        if is_number(record.get(key)):
            by_seed.setdefault(record["seed"], []).append(record[key])
    means = [statistics.mean(values) for values in by_seed.values()]
    if not means:
        return None, None
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else None


def is_number(value: object) -> bool:
    """Whether a figure of a record is one that can be reckoned with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def written(row: Mapping[str, Any], key: str) -> str:
    """A value as a table shows it."""
    if row[key] is None:
        return "–"
    text = COLUMNS[key][1](row[key])
    spread = row["spread"].get(key)
    return text if spread is None else f"{text} ± {COLUMNS[key][1](spread)}"


def shown(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of which something is known; how many cells trained in a batch only where any did."""
    alone = [] if any(is_batched(row) for row in found) else ["batch"]
    return [key for key in COLUMNS if key not in alone and any(row[key] is not None for row in found)]


def is_batched(row: Mapping[str, Any]) -> bool:
    """Whether any of a method's cells trained with others in one batch."""
    return (row["batch"] or 1) > 1


def legend(found: Sequence[Mapping[str, Any]], kinds: Iterable[str]) -> str:
    """What a reader must know of the rows, whose cells ran on these kinds of devices."""
    memory = "; ".join([PLANNED_LEGEND, *(MEASURED_LEGEND[kind] for kind in sorted(set(kinds)))])
    drawing = [DRAWING_LEGEND] if any(row["inference_bytes"] is not None for row in found) else []
    together = [TOGETHER_LEGEND] if any(map(is_batched, found)) else []
    lacking = ", ".join(f"{row['method']} lacks {row['lacking']}" for row in found if row["cells"] and row["lacking"])
    uneven = [UNEVEN_LEGEND.format(lacking)] if lacking else []
    return " ".join([SCORES_LEGEND, *uneven, f"{memory}.", *drawing, *together])


def as_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    keys = shown(found)
    lines = [["method", *(COLUMNS[key][0] for key in keys), "cells"]]
    lines += [[row["method"], *(written(row, key) for key in keys), cells_of(row)] for row in found]
    head = f"| {' | '.join(lines[0])} |\n|{'---|' * len(lines[0])}\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines[1:])


def cells_of(row: Mapping[str, Any]) -> str:
    """How many cells there are, and how many came to nothing, by what was short."""
    told = ", ".join(f"{count} {FAILURES.get(kind, kind)}" for kind, count in row["failures"].items())
    return f"{row['cells']} ({told})" if told else str(row["cells"])


def as_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV: values in bytes, seconds and minutes, spreads in columns of their own."""
    buffer = io.StringIO()
    names = ["method", *(name for key in COLUMNS for name in ([key, f"{key}_spread"] if key in SCORES else [key]))]
    names += ["cells", "failed", *(_column(kind) for kind in FAILURES)]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in found:
        short = {_column(kind): row["failures"].get(kind, 0) for kind in FAILURES}
        writer.writerow({**row, **short, **{f"{key}_spread": row["spread"].get(key) for key in SCORES}})
    return buffer.getvalue()


def _column(kind: str) -> str:
    """Of failures of a kind, in CSV."""
    return FAILURES[kind].replace(" ", "_")
