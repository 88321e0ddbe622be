"""`compare`: all methods of the papers' tables on subjects of the tiny world, through `mep compare`.

The comparison's folder keeps what is done, so that the same command carries on. Its cells' records are kept beside the
committed figures as well, from which a folder that is gone is begun again; a sheet keeps pictures whose runs are gone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import weights
from benchmarks.rows import Row, row
from mep_lightning.commands import compare
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.table import COLUMNS, MEANS
from mep_lightning.run_folder import write_atomically

METHODS = (
    "dreambooth",
    "lora",
    "qlora",
    "hollowed_net",
    "selective",
    "peqa",
    "tuneqdm",
    "textual_inversion",
    "gf_ti",
    "zoodip",
    "zoodip_fast",
)
"""In the order of ZOODiP's tables: what trains weights first, then what trains a token."""


def run(
    folder: Path, kept: Path, *, subjects: int = 10, seeds: int = 3, images: int = 2, workers: int = 2
) -> list[Row]:
    """Run the cells that are missing.

    Args:
        folder: the comparison's.
        kept: JSON lines; what is compared, then a cell's record each.
        subjects, seeds: how many.
        images: pictures a prompt.
        workers: processes of one thread each.

    Returns:
        A row for each of a method's columns: `value`, and of scores `spread`; `subjects` and `seeds` are how many there
        are of its cells.
    """
    words = ["--methods", *METHODS, "--subjects", str(subjects), "--seeds", str(seeds), "--out", str(folder)]
    words += ["--images-per-prompt", str(images), "--workers", str(workers), "--threads", "1"]
    comparison = ComparisonFolder(folder)
    restore(comparison, kept)
    try:
        compare.run(words)
    finally:
        keep(comparison, kept)
    return rows(json.loads(comparison.table.with_suffix(".json").read_text()))


def keep(folder: ComparisonFolder, kept: Path) -> None:
    """Write a comparison's records, and what they depend on, where they are committed."""
    if not folder.described.is_file():
        return
    what = {"weights": weights(), "comparison": json.loads(folder.described.read_text())}
    write_atomically(kept, "".join(json.dumps(line) + "\n" for line in [what, *folder.records().values()]))


def restore(folder: ComparisonFolder, kept: Path) -> None:
    """Give a folder the records that are kept and that it lacks; those of other weights are left alone."""
    what, *records = map(json.loads, kept.read_text().splitlines()) if kept.is_file() else [{}]
    if what.get("weights") != weights():
        return
    folder.claim(what["comparison"])
    there = folder.records()
    for record in records:
        if (record["method"], record["subject"], record["seed"]) not in there:
            folder.keep(record)


def rows(content: dict[str, Any]) -> list[Row]:
    """The rows of a comparison's table.json, a row a figure."""
    found = []
    for line in content["rows"]:
        size = {"cells": line["cells"], "failed": line["failed"]}
        for key in COLUMNS:
            if line[key] is not None:
                spread = {"spread": line["spread"][key] or 0.0} if key in MEANS else {}
                found.append(row("compare", line["method"], key, line[key], "") | spread | size)
    return found


def lines(found: list[Row]) -> list[dict[str, Any]]:
    """`rows` undone: a dictionary a method, as `mep_lightning.comparison.table` has it."""
    methods = {}
    for one in found:
        size = {"cells": one["cells"], "failed": one["failed"]}
        line = methods.setdefault(one["case"], dict.fromkeys(COLUMNS) | {"method": one["case"], "spread": {}} | size)
        line[one["metric"]] = one["value"]
        if "spread" in one:
            line["spread"][one["metric"]] = one["spread"]
    return list(methods.values())
