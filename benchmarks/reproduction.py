"""`reproduction`: the tables of docs/reproduction.md, written anew from the figures in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.quality import SCORES
from benchmarks.rows import Row

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reproduction.md"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dino_inter": "DINO inter",
    "heldout_loss": "held-out loss",
}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def scores(rows: list[Row]) -> str:
    """A variant a line: mean ± spread over seeds of every score."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["metric"]: row for row in rows if row["case"] == case}
        size = f"{by['dino']['subjects']} × {by['dino']['seeds']}"
        lines.append([case, size, *(f"{by[name]['value']:.3f} ± {by[name]['spread']:.3f}" for name in SCORES)])
    return markdown(["variant", "subjects × seeds", *(NAMES[name] for name in SCORES)], lines)


def objectives(rows: list[Row]) -> str:
    """A trial a line."""
    return markdown(
        ["trial", "(CLIP-I + DINO) / 2"],
        [[row["case"].partition(" ")[2], f"{row['value']:.3f}"] for row in rows if row["metric"] == "objective"],
    )


def speeds(rows: list[Row]) -> str:
    """A case a line: both times and their ratio."""
    return markdown(
        ["step", "batched, ms", "one after the other, ms", "times as fast"],
        [
            [row["case"], f"{1e3 * row['value']:.0f}", f"{1e3 * row['baseline']:.0f}", f"{row['ratio']:.2f}"]
            for row in rows
        ],
    )


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "quality": scores,
    "ablation": scores,
    "tune-textual_inversion": objectives,
    "tune-zoodip": objectives,
    "step": speeds,
}


def render(text: str, results: Path = RESULTS) -> str:
    """A document with every table between `<!-- table: NAME -->` and `<!-- end -->` made from NAME.json."""

    def table(found: re.Match[str]) -> str:
        name = found[2]
        rows = json.loads((results / f"{name}.json").read_text())["rows"]
        return f"{found[1]}{TABLES[name](rows)}{found[3]}"

    return PLACE.sub(table, text)
