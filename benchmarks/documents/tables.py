"""`tables`: the tables and plots of docs/, from benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.documents import cost, figures, papers, plots, scores
from benchmarks.rows import RESULTS, Row
from benchmarks.trained.tune import AXES

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTS = tuple(
    DOCS / f"{name}.md"
    for name in (
        "reproduction",
        "performance",
        "memory",
        "forward-gradients",
        "conditioning-subspace",
        "scaling",
        "tiny",
    )
)
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[list[Row]], str]] = {
    "compare": scores.compared,
    "quality": scores.scores,
    "ablation": scores.scores,
    "ablation:cells": scores.of_one_subject,
    "subspace": scores.settings,
    "timesteps": scores.scores,
    "precision": scores.scores,
    "forward": scores.scores,
    "estimators": scores.scores,
    "estimators:differences": scores.differences,
    "search": scores.scores,
    "search:differences": scores.differences,
    "loras": scores.scores,
    "paths": scores.travelled,
    "paths:dims": scores.truncated,
    "branches": scores.branches,
    "heard": scores.heard,
    "conditioning": scores.listened,
    "pairs": scores.paired,
    **{name: partial(scores.beside, table) for name, table in papers.TABLES.items()},
    **{f"tune-{method}": scores.objectives for method in AXES},
    "step": figures.speeds,
    "step-sd15": figures.real_speeds,
    "cuda/step-sd15": figures.real_speeds,
    "methods-sd15": figures.methods,
    "methods": figures.methods,
    "cuda/methods-sd15": figures.methods,
    "cuda/methods-sd15:paper": figures.rates,
    "memory-sd15:planned": figures.planned,
    "memory-sd15:measured": figures.measured,
    "memory-sd21:planned": figures.planned,
    "memory-sdxl:planned": figures.planned,
    "cuda/memory-sd15:measured": figures.measured,
    "published": figures.published,
    "several": figures.batched,
    "cuda/profile-sd15": figures.profiled,
    "cuda/profile-sd15:cost": cost.of_a_step,
    "cuda/methods-sd15:cost": cost.of_methods,
    "tiny": figures.plain,
    "autoencoder": figures.halves,
    "cuda/autoencoder": figures.halves,
    "kernels": figures.operations,
    "cuda/kernels": figures.operations,
    "fidelity": figures.fidelities,
    "fidelity:tangents": figures.tangents,
    "cuda/fidelity": figures.fidelities,
    "cuda/fidelity:tangents": figures.tangents,
}
"""FILE or FILE:PART -> what writes its table."""


def results(name: str, folder: Path = RESULTS) -> Path:
    """The file of a table's figures."""
    return folder / f"{name.partition(':')[0]}.json"


def about(content: dict[str, Any]) -> str:
    """Where and with what figures were measured, in a line."""
    return f"Measured on {content['device']}, torch {content['torch']}, {content['date']}.\n\n"


def render(text: str, folder: Path = RESULTS) -> str:
    """A document with every table between `<!-- table: NAME -->` and `<!-- end -->` made from its file."""

    def table(found: re.Match[str]) -> str:
        name, path = found[2], results(found[2], folder)
        if not path.exists():
            return f"{found[1]}Not measured yet.\n{found[3]}"
        content = json.loads(path.read_text())
        return f"{found[1]}{about(content)}{TABLES[name](content['rows'])}{found[3]}"

    return PLACE.sub(table, text)


def shown(names: Iterable[str]) -> Iterator[str]:
    """The tables of these names that are measured."""
    for name in names:
        if results(name).exists():
            content = json.loads(results(name).read_text())
            yield about(content) + TABLES[name](content["rows"])


def write() -> None:
    """All documents and their plots."""
    for document in DOCUMENTS:
        document.write_text(render(document.read_text()))
    for name, (suite, draw) in plots.PLOTS.items():
        if results(suite).exists():
            figure = draw(json.loads(results(suite).read_text())["rows"])
            if figure is not None:
                figure.savefig(DOCS / "images" / f"{name}.png", dpi=130)
