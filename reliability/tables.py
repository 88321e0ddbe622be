"""`tables`: those of docs/reliability.md, from reliability/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.documents.markdown import markdown
from benchmarks.documents.tables import PLACE
from benchmarks.rows import Row
from reliability.kill import PHASES, WHEN
from reliability.mutate import OUTCOMES
from reliability.soak import CHANGES, FLAT, UNDECIDED

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"
VERDICTS = {FLAT: "flat", UNDECIDED: "undecided: the run was too short to tell", CHANGES: "not flat"}


def killed(rows: list[Row]) -> str:
    """A method a line, and all of them together."""
    metrics = [
        "kills",
        *WHEN,
        *PHASES,
        "half-written files under a final name",
        "lost runs",
        "runs with another export",
    ]
    by = _by(rows)
    cases = list(by)
    lines = [[metric, *(f"{by[case][metric]:g}" for case in cases)] for metric in metrics]
    return markdown(["", *cases, "all"], [[*line, f"{sum(float(one) for one in line[1:]):g}"] for line in lines])


def mutated(rows: list[Row]) -> str:
    """A kind of file a line, and all of them together."""
    by = _by(rows)
    counts = [[case, *(by[case][outcome] for outcome in OUTCOMES)] for case in by]
    counts.append(["all", *(sum(line[index] for line in counts) for index in range(1, len(OUTCOMES) + 1))])
    lines = [[line[0], f"{sum(line[1:]):g}", *(f"{one:g}" for one in line[1:])] for line in counts]
    return markdown(["file", "cases", *OUTCOMES], lines)


def soaked(rows: list[Row]) -> str:
    """Memory and speed a line, with slope and verdict."""
    ((case, by),) = _by(rows).items()
    lines = []
    for name, unit in (("resident memory", "MiB"), ("speed", "steps / s of the processor")):
        slope, error = by[f"{name}, slope"], by[f"{name}, error of the slope"]
        verdict = VERDICTS[round(by[f"{name}, verdict"])]
        lines.append([f"{name}, {unit}", f"{by[name]:.4g}", f"{slope:+.2g} ± {error:.2g}", verdict])
    return markdown([f"{case}, {by['steps']:,.0f} steps", "mean", "slope in 20,000 steps", "verdict"], lines)


def _by(rows: list[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for one in rows:
        found.setdefault(one["case"], {})[one["metric"]] = one["value"]
    return found


TABLES: dict[str, Callable[[list[Row]], str]] = {"kill": killed, "mutate": mutated, "soak": soaked}


def render(text: str) -> str:
    """The document with every table as it is measured now; a suite without figures says so."""

    def table(match: Any) -> str:
        path = RESULTS / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}Not measured yet.\n{match[3]}"
        about = json.loads(path.read_text())
        note = f"\nMeasured on {about['device']}, torch {about['torch']}, {about['date']}, commit {about['commit']}.\n"
        return f"{match[1]}{TABLES[match[2]](about['rows'])}{note}{match[3]}"

    return PLACE.sub(table, text)


def write() -> None:
    """The document anew."""
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
