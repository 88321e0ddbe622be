"""A comparison in one page: its table, what memory buys, and pictures of every method beside the photos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image

from mep_lightning.comparison import table
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.planned import device_of, planned
from mep_lightning.comparison.plots import memory_bars, tradeoff
from mep_lightning.comparison.subjects import Subject
from mep_lightning.errors import UserError, counted
from mep_lightning.evaluation.page import Picture, picture, render
from mep_lightning.evaluation.plots import MARK, to_svg
from mep_lightning.photos import find_photos
from mep_lightning.run_folder import write_atomically

SHOWN = 192
"""Pixels a side of a picture in the matrix."""
SUBJECTS, PROMPTS, PHOTOS = 10, 3, 5
"""How many the matrix shows at most, and of a subject's photos beside it."""


@dataclass
class Line:
    """A row of the matrix: a prompt, and a method's picture of it in every column."""

    prompt: str
    pictures: list[Picture | None]


@dataclass
class Block:
    """A subject's rows, and its photos."""

    name: str
    class_word: str
    photos: list[Picture]
    lines: list[Line]


@dataclass
class Page:
    """All that the template shows."""

    title: str
    written: str
    facts: dict[str, str]
    header: list[str]
    rows: list[list[str]]
    failures: list[tuple[str, str]]
    legend: str = ""
    memory: Markup | None = None
    tradeoff: Markup | None = None
    methods: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    left_out: str = ""


@dataclass
class Compared:
    """What a comparison's folder holds: its cells' records, and the table of them.

    Attributes:
        records: of all cells.
        rows: of the table.
        about: what is told of the whole.
        legend: what a reader must know of the rows.
    """

    records: Sequence[table.Record]
    rows: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]
    legend: str

    @property
    def failures(self) -> list[table.Record]:
        """Records of cells of which nothing came."""
        return [record for record in self.records if "error" in record]


def compared(folder: ComparisonFolder, methods: Sequence[str], base: str, rehearse: bool = True) -> Compared:
    """Everything that a folder holds.

    Args:
        folder: of the comparison.
        methods: the first of the table; others that the folder has cells of follow.
        base: as for `load_base`.
        rehearse: whether methods whose plan is not known yet are rehearsed.
    """
    records = list(folder.records().values())
    names = list(dict.fromkeys([*methods, *(record["method"] for record in records)]))
    found = table.rows(records, names, planned(folder, records, base, rehearse))
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {
        "base": base,
        "device": ", ".join(sorted({str(record["device"]) for record in records if record.get("device")})) or here,
        "torch": torch.__version__,
        "mep-lightning": _version(),
        "subjects": len({record["subject"] for record in records}),
        "seeds": len({record["seed"] for record in records}),
    }
    measured = [record for record in records if any(table.is_number(record.get(key)) for key in table.GROWN)]
    return Compared(records, found, about, table.legend(found, map(device_of, measured)))


def write_table(folder: ComparisonFolder, all_of_it: Compared) -> None:
    """The table in Markdown, CSV and JSON."""
    write_atomically(folder.table, f"{table.as_markdown(all_of_it.rows)}\n{all_of_it.legend}\n")
    write_atomically(folder.table.with_suffix(".csv"), table.as_csv(all_of_it.rows))
    content = {"about": all_of_it.about, "rows": all_of_it.rows, "failures": all_of_it.failures}
    write_atomically(folder.table.with_suffix(".json"), json.dumps(content, indent=2) + "\n")


def write_all(folder: ComparisonFolder, all_of_it: Compared, subjects: Sequence[Subject]) -> str:
    """Write the table and the page, with pictures of these subjects; what was written, in a sentence."""
    write_table(folder, all_of_it)
    write_atomically(folder.report, render("comparison.html.j2", page=_page(folder, all_of_it, subjects)))
    count = counted(len(all_of_it.failures), "cell")
    said = f"what each said is in the report, and all of it below {folder.logs.name}"
    failed = f", {count} failed ({said})" if all_of_it.failures else ""
    return f"In {folder.root}: {folder.table.name}, table.csv, table.json and {folder.report.name}{failed}."


def _version() -> str:
    try:
        return metadata.version("mep-lightning")
    except metadata.PackageNotFoundError:
        return "of a checkout"


def _page(folder: ComparisonFolder, all_of_it: Compared, subjects: Sequence[Subject]) -> Page:
    found = all_of_it.rows
    keys = table.shown(found)
    page = Page(
        title=folder.root.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        facts={key: str(value) for key, value in all_of_it.about.items()},
        header=["method", *(table.COLUMNS[key][0] for key in keys), "cells"],
        rows=[[row["method"], *(table.written(row, key) for key in keys), table.cells_of(row)] for row in found],
        failures=[
            (f"{record['method']} on {record['subject']} #{record['seed']}", str(record["error"]))
            for record in all_of_it.failures
        ],
        legend=all_of_it.legend,
    )
    for name, figure in (("memory", memory_bars(found, MARK)), ("tradeoff", tradeoff(found, MARK))):
        if figure is not None:
            setattr(page, name, Markup(to_svg(figure, name)))
    page.methods = [row["method"] for row in found if row["cells"]]
    page.blocks = [_block(folder, subject, page.methods, all_of_it.records) for subject in subjects[:SUBJECTS]]
    if (of := int(all_of_it.about["subjects"])) > len(page.blocks):
        page.left_out = f"Pictures are of {len(page.blocks)} of the {of} subjects; the others' lie below runs."
    return page


def _block(
    folder: ComparisonFolder, subject: Subject, methods: Sequence[str], records: Sequence[table.Record]
) -> Block:
    good = [record for record in records if record["subject"] == subject.name and "error" not in record]
    drawn = {}
    for method in methods:
        seeds = [record["seed"] for record in good if record["method"] == method]
        folders = [folder.run(method, subject.name, seed) / "evaluation" for seed in sorted(seeds)[:1]]
        drawn[method] = _drawn(folders[0]) if folders else []
    longest = max((len(pictures) for pictures in drawn.values()), default=0)
    count = min(PROMPTS, longest)
    lines = []
    for index in [number * longest // count for number in range(count)]:
        first = next((pictures[index] for pictures in drawn.values() if index < len(pictures)), None)
        shown = [_opened(pictures[index]) if index < len(pictures) else None for pictures in drawn.values()]
        lines.append(Line(_prompt(first), shown))
    return Block(subject.name, subject.class_word, _photos(subject.photos), lines)


def _photos(folder: Path) -> list[Picture]:
    """The first photos of a subject; one that is damaged, which a cell has told, is left out."""
    found = []
    with suppress(UserError):
        for photo in find_photos(folder)[:PHOTOS]:
            with suppress(UserError):
                found.append(picture(photo.read(SHOWN), side=SHOWN))
    return found


def _drawn(folder: Path) -> list[Path]:
    """The first picture of every prompt, in the prompts' order."""
    by_prompt: dict[str, Path] = {}
    for path in sorted(folder.glob("*-seed*.png")):
        by_prompt.setdefault(path.name.partition("-")[0], path)
    return list(by_prompt.values())


def _prompt(path: Path | None) -> str:
    if path is None:
        return ""
    with suppress(OSError), Image.open(path) as opened:
        return str(opened.info.get("prompt", path.stem))
    return path.stem


def _opened(path: Path) -> Picture | None:
    try:
        with Image.open(path) as opened:
            return picture(opened, side=SHOWN)
    except OSError:
        return None
