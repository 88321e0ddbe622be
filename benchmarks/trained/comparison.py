"""`compare`: all methods of the papers' tables on subjects of the tiny world, through `mep compare`.

The comparison's folder keeps what is done, so that the same command carries on; of a method whose recipe or values have
changed it forgets all. Cells' records are kept beside the committed figures as well, from which a folder that is gone
is begun again; a sheet keeps pictures whose runs are gone. What memory takes does not hang on how long a cell trains:
it can be measured anew by itself, in short trainings, and put into the records that are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, measured_with, row
from benchmarks.trained import quality
from mep_lightning import defaults
from mep_lightning.commands import compare
from mep_lightning.commands.compare_request import options_of_compare, shared
from mep_lightning.commands.recipes import find_recipe, read_recipe
from mep_lightning.comparison import table
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.planned import PLANNED, planned
from mep_lightning.comparison.table import COLUMNS, GROWN
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
LATER = ("members_at_once",)
"""Settings of a module that are younger than the first cells."""
MEMORY_STEPS = 300
"""Of the trainings that measure memory alone."""
KEYS = "keys.json"
"""In the comparison's folder, what each method's cells were made with."""


def run(
    folder: Path, kept: Path, *, subjects: int = 10, seeds: int = 3, images: int = 2, workers: int = 2
) -> list[Row]:
    """Run the cells that are missing; what stops before the last (Ctrl-C) has figures of what all methods have.

    Args:
        folder: of the comparison.
        kept: JSON lines, a cell's record each.
        subjects, seeds: how many.
        images: pictures a prompt.
        workers: processes of one thread each.

    Returns:
        A row for each of a method's columns: `value`, and of scores from several seeds `spread`; `cells` is how many
        there are of its cells, and `failures` of how many nothing came, by kind.
    """
    known, comparison = keys(images), ComparisonFolder(folder)
    words = _words(comparison, subjects, seeds, images, workers)
    comparison.claim(shared(options_of_compare().parse_args(words)))
    forget(comparison, known)
    restore(comparison, kept, known)
    with suppress(KeyboardInterrupt):
        try:
            compare.run(words)
        finally:
            keep(comparison, kept, known)
    return figures(comparison)


def _words(comparison: ComparisonFolder, subjects: int, seeds: int, images: int, workers: int) -> list[str]:
    """What `mep compare` is told."""
    words = ["--methods", *METHODS, "--subjects", str(subjects), "--seeds", str(seeds), "--out", str(comparison.root)]
    return [*words, "--images-per-prompt", str(images), "--workers", str(workers), "--threads", "1"]


def measure_memory(folder: Path, kept: Path, *, images: int = 2, workers: int = 2, subjects: int = 3) -> None:
    """Train a few cells of every method for `MEMORY_STEPS`, and put what they took into the records of these.

    Other cells that ran on a CPU lose theirs, which was measured otherwise.

    Args:
        folder: of these trainings, a comparison of its own.
        kept, images, workers: as for `run`, whose records they are.
        subjects: how many, from one seed.
    """
    known, comparison = keys(images), ComparisonFolder(folder)
    compare.run([*_words(comparison, subjects, 1, 1, workers), "--max-steps", str(MEMORY_STEPS)])
    done = [record for record in comparison.records().values() if "error" not in record]
    taken = {_cell(record): record for record in done if record["device"] == "cpu"}
    about = measured_with("cpu", threads=1)
    lines = []
    for record in map(json.loads, kept.read_text().splitlines()):
        if record["key"] == known.get(record["method"]) and record["device"] == "cpu":
            mine = taken.get(_cell(record))
            record.pop("memory_of", None)
            record |= {key: mine[key] if mine else None for key in GROWN}
            if mine:
                record["memory_of"] = {"steps": MEMORY_STEPS, "date": about["date"], "commit": about["commit"]}
        lines.append(json.dumps(record) + "\n")
    write_atomically(kept, "".join(lines))


def figures(comparison: ComparisonFolder) -> list[Row]:
    """The rows of the subjects and seeds that every method has a cell of: no other would be fair.

    A seed that lacks subjects of another waits: what differs between the two would be those.
    """
    records = comparison.records()
    by_method = [{(subject, seed) for method, subject, seed in records if method == name} for name in METHODS]
    shared = set.intersection(*by_method)
    subjects = {seed: {subject for subject, other in shared if other == seed} for _, seed in shared}
    most = max(subjects.values(), key=len, default=set())
    whole = {(subject, seed) for subject, seed in shared if subjects[seed] == most}
    even = [record for (_, *which), record in records.items() if tuple(which) in whole]
    return rows(table.rows(even, METHODS, planned(comparison, even, "tiny")))


def keys(images: int) -> dict[str, str]:
    """What each method's figures depend on: its recipe, its values for tiny, pictures and the embedded weights."""
    kept_in = ("fp32", "int8", "int4")
    told = {
        name: {
            "recipe": _without_later_nulls(read_recipe(find_recipe(name))),
            "values": [defaults.lookup(name, "tiny", precision) for precision in kept_in],
        }
        for name in METHODS
    }
    return {name: quality.fingerprint(settings, "test", images) for name, settings in told.items()}


def _without_later_nulls(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was before the settings in LATER came, where it leaves them off."""
    own = {key: value for key, value in recipe.get("model", {}).items() if value is not None or key not in LATER}
    return recipe | {"model": own}


def keep(comparison: ComparisonFolder, kept: Path, known: Mapping[str, str]) -> None:
    """Add records of cells that came to something, and what they were measured with, to those that are committed."""
    there = {_cell(record) for record in _kept(kept, known)}
    about = measured_with("cpu", threads=1)
    about["machine"] = about.pop("device")
    plans = json.loads(comparison.plans.read_text()) if comparison.plans.is_file() else {}
    new = [record for record in comparison.records().values() if "error" not in record and _cell(record) not in there]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        for record in new:
            plan = {key: plans[record["method"]][key] for key in PLANNED} if record["method"] in plans else {}
            file.write(json.dumps(record | plan | about | {"key": known[record["method"]]}) + "\n")


def forget(comparison: ComparisonFolder, known: Mapping[str, str]) -> None:
    """Take out of a comparison what was made with other settings of a method than today's."""
    path = comparison.root / KEYS
    before = json.loads(path.read_text()) if path.is_file() else known
    old = {method for method in before if before[method] != known.get(method)}
    if old:
        left = [record for record in comparison.records().values() if record["method"] not in old]
        write_atomically(comparison.cells, "".join(json.dumps(record) + "\n" for record in left))
        for method in old:
            shutil.rmtree(comparison.root / "runs" / method, ignore_errors=True)
        for path in (comparison.plans, comparison.settings):
            path.unlink(missing_ok=True)
    write_atomically(path, json.dumps(known, indent=2) + "\n")


def restore(comparison: ComparisonFolder, kept: Path, known: Mapping[str, str]) -> None:
    """Give a comparison the committed records that it lacks."""
    there = comparison.records()
    for record in _kept(kept, known):
        if _cell(record) not in there:
            comparison.keep(record)


def _kept(kept: Path, known: Mapping[str, str]) -> list[dict[str, Any]]:
    """Records that were made with each method's settings of today."""
    lines = kept.read_text().splitlines() if kept.is_file() else []
    return [record for record in map(json.loads, lines) if record["key"] == known.get(record["method"])]


def _cell(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["method"], record["subject"], record["seed"]


def rows(told: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The lines of a comparison's table, a row a figure."""
    found = []
    for line in told:
        size = {"cells": line["cells"], "failures": line["failures"]}
        for key in COLUMNS:
            if line[key] is not None:
                spread = {"spread": line["spread"][key]} if line["spread"].get(key) is not None else {}
                found.append(row("compare", line["method"], key, line[key], "") | spread | size)
    return found


def lines(found: list[Row]) -> list[dict[str, Any]]:
    """`rows` undone: a dictionary a method, as `mep_lightning.comparison.table` has it."""
    methods = {}
    for one in found:
        size = {"cells": one["cells"], "failures": one["failures"]}
        line = methods.setdefault(one["case"], dict.fromkeys(COLUMNS) | {"method": one["case"], "spread": {}} | size)
        line[one["metric"]] = one["value"]
        if "spread" in one:
            line["spread"][one["metric"]] = one["spread"]
    return list(methods.values())
