"""A comparison in one page: its table, what memory buys, and pictures of every method beside the photos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from mep_lightning.errors import counted
from mep_lightning.evaluation.page import Picture, picture, render
from mep_lightning.evaluation.plots import MARK, to_svg
from mep_lightning.photos import find_photos
from mep_lightning.run_folder import write_atomically

SHOWN = 192
"""Pixels a side of a picture in the matrix."""
SUBJECTS, PROMPTS = 10, 3
"""How many the matrix shows at most."""


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


def write_all(folder: ComparisonFolder, methods: Sequence[str], subjects: Sequence[Subject], base: str) -> str:
    """Write the table (Markdown, CSV, JSON) and the page; what was written, in a sentence."""
    names = {subject.name for subject in subjects}
    records = [
        record for (method, subject, _), record in folder.records().items() if method in methods and subject in names
    ]
    found = table.rows(records, methods, planned(folder, records, base))
    about = {
        "base": base,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "mep-lightning": _version(),
        "subjects": len({record["subject"] for record in records}),
        "seeds": len({record["seed"] for record in records}),
    }
    measured = [record for record in records if any(table.is_number(record.get(key)) for key in table.GROWN)]
    legend = table.legend(found, map(device_of, measured))
    write_atomically(folder.table, f"{table.as_markdown(found)}\n{legend}\n")
    write_atomically(folder.table.with_suffix(".csv"), table.as_csv(found))
    failures = [record for record in records if "error" in record]
    content = {"about": about, "rows": found, "failures": failures}
    write_atomically(folder.table.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    write_atomically(
        folder.report, render("comparison.html.j2", page=_page(folder, found, records, subjects, about, legend))
    )
    failed = f", {counted(len(failures), 'cell')} failed (what each said is in the report)" if failures else ""
    return f"In {folder.root}: {folder.table.name}, table.csv, table.json and {folder.report.name}{failed}."


def _version() -> str:
    try:
        return metadata.version("mep-lightning")
    except metadata.PackageNotFoundError:
        return "of a checkout"


def _page(
    folder: ComparisonFolder,
    found: Sequence[Mapping[str, Any]],
    records: Sequence[table.Record],
    subjects: Sequence[Subject],
    about: Mapping[str, Any],
    legend: str,
) -> Page:
    keys = table.shown(found)
    page = Page(
        title=folder.root.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        facts={key: str(value) for key, value in about.items()},
        header=["method", *(table.COLUMNS[key][0] for key in keys), "cells"],
        rows=[[row["method"], *(table.written(row, key) for key in keys), table.cells_of(row)] for row in found],
        failures=[
            (f"{record['method']} on {record['subject']} #{record['seed']}", str(record["error"]))
            for record in records
            if "error" in record
        ],
        legend=legend,
    )
    for name, figure in (("memory", memory_bars(found, MARK)), ("tradeoff", tradeoff(found, MARK))):
        if figure is not None:
            setattr(page, name, Markup(to_svg(figure, name)))
    page.methods = [row["method"] for row in found if row["cells"]]
    page.blocks = [_block(folder, subject, page.methods, records) for subject in subjects[:SUBJECTS]]
    return page


def _block(
    folder: ComparisonFolder, subject: Subject, methods: Sequence[str], records: Sequence[table.Record]
) -> Block:
    mine = [record for record in records if record["subject"] == subject.name and "error" not in record]
    seed = min((record["seed"] for record in mine), default=0)
    drawn = {method: _drawn(folder.run(method, subject.name, seed) / "evaluation") for method in methods}
    longest = max((len(pictures) for pictures in drawn.values()), default=0)
    count = min(PROMPTS, longest)
    lines = []
    for index in [number * longest // count for number in range(count)]:
        first = next((pictures[index] for pictures in drawn.values() if index < len(pictures)), None)
        shown = [_opened(pictures[index]) if index < len(pictures) else None for pictures in drawn.values()]
        lines.append(Line(_prompt(first), shown))
    photos = [picture(photo.read(SHOWN), side=SHOWN) for photo in find_photos(subject.photos)[:5]]
    return Block(subject.name, subject.class_word, photos, lines)


def _drawn(folder: Path) -> list[Path]:
    """The first picture of every prompt, in the prompts' order."""
    by_prompt: dict[str, Path] = {}
    for path in sorted(folder.glob("*-seed*.png")):
        by_prompt.setdefault(path.name.partition("-")[0], path)
    return list(by_prompt.values())


def _prompt(path: Path | None) -> str:
    if path is None:
        return ""
    with Image.open(path) as opened:
        return str(opened.info.get("prompt", path.stem))


def _opened(path: Path) -> Picture | None:
    try:
        with Image.open(path) as opened:
            return picture(opened, side=SHOWN)
    except OSError:
        return None
