"""`tables`: the tables and plots of docs/, from benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks import cost, papers, plots
from benchmarks.differences import Difference
from benchmarks.fidelity import CARRIED
from benchmarks.paths import DIMS, MARKS, RUNS
from benchmarks.published import OURS, USED
from benchmarks.quality import SCORES
from benchmarks.rows import Row
from benchmarks.tune import AXES

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
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
NAMES = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dino_inter": "DINO inter",
    "heldout_loss": "held-out loss",
    "steps_per_second": "steps/s",
    "minutes": "minutes",
}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def scores(rows: list[Row]) -> str:
    """A variant a line: every score's mean ± spread over seeds, if there are some, and what its training took."""
    lines, timed = [], any(row["metric"] == "seconds" for row in rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["metric"]: row for row in rows if row["case"] == case}
        size = f"{by['dino']['subjects']} × {by['dino']['seeds']}"
        several = by["dino"]["seeds"] > 1
        line = [case, size]
        for name in SCORES:
            places = 4 if name == "heldout_loss" else 3
            spread = f" ± {by[name]['spread']:.{places}f}" if several else ""
            line.append(f"{by[name]['value']:.{places}f}{spread}")
        lines.append([*line, f"{by['seconds']['value']:.0f}"] if timed else line)
    header = ["variant", "subjects × seeds", *(NAMES[name] for name in SCORES)]
    return markdown([*header, "training, s"] if timed else header, lines)


def differences(rows: list[Row]) -> str:
    """A variant a line: what it scores beyond the first, paired by subject and seed, ± one standard error."""
    beyond = {(row["case"], row["metric"]): Difference(**row["beyond_first"]) for row in rows if "beyond_first" in row}
    lines = []
    for case in dict.fromkeys(case for case, _ in beyond):
        mine = [beyond[case, name] for name in SCORES]
        told = [one.told(4 if name == "heldout_loss" else 3) for name, one in zip(SCORES, mine, strict=True)]
        lines.append([case, str(mine[0].cells), *told])
    return markdown([f"beyond {rows[0]['case']}", "cells", *(NAMES[name] for name in SCORES)], lines)


def beside(paper: papers.Table, rows: list[Row]) -> str:
    """A variant a line: our scores with the paper's in brackets; below, how many pairs stand in the paper's order."""
    ours = {name: {row["metric"]: row for row in rows if row["case"] == name} for name in paper.rows}
    metrics = list(next(iter(paper.rows.values())))
    lines = [
        [name, *(f"{_figure(ours[name][metric]['value'])} ({_figure(paper.rows[name][metric])})" for metric in metrics)]
        for name in paper.rows
        if ours[name]
    ]
    if len(lines) < len(paper.rows):
        return "Not measured yet.\n"
    counts, spreads = [], any("spread" in row for by_metric in ours.values() for row in by_metric.values())
    for metric in metrics:
        pairs = [
            (paper.rows[one][metric] - paper.rows[two][metric], ours[one][metric], ours[two][metric])
            for one, two in combinations(paper.rows, 2)
        ]
        plain = [
            (theirs, a, b)
            for theirs, a, b in pairs
            if abs(a["value"] - b["value"]) > max(one.get("spread", 0.0) for one in (a, b))
        ]
        same, of_plain = (
            sum(theirs * (a["value"] - b["value"]) > 0 for theirs, a, b in some) for some in (pairs, plain)
        )
        bracket = f" ({of_plain} of {len(plain)})" if spreads else ""
        counts.append(f"{NAMES[metric]} {same} of {len(pairs)}{bracket}")
    table = markdown([f"ours ({paper.name})", *(NAMES[metric] for metric in metrics)], lines)
    of_plain_ones = ", and of them those that differ by more than the spread over seeds" if spreads else ""
    return f"{table}\nPairs in the paper's order{of_plain_ones}: {', '.join(counts)}.\n"


def _figure(value: float) -> str:
    """Scores to the third place, other figures to the third digit."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def compared(rows: list[Row]) -> str:
    """A method a line, as in the table of `mep compare`."""
    from benchmarks.comparison import lines
    from mep_lightning.comparison.table import as_markdown

    return as_markdown(lines(rows))


def travelled(rows: list[Row]) -> str:
    """A run a line: the held-out loss after so many forward passes, and the share of its path that SG keeps."""
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    lines = []
    for name in RUNS:
        losses = [values.get((f"{name}, {mark} forward passes", "held-out loss")) for mark in MARKS]
        kept = values.get((name, "share of the path's dimensions kept"))
        lines.append(
            [name, *("" if one is None else f"{one:.4f}" for one in losses), "" if kept is None else f"{kept:.2f}"]
        )
    return markdown(["run", *(f"{mark:,}" for mark in MARKS), "of its path kept"], lines)


def truncated(rows: list[Row]) -> str:
    """A run a line: the held-out loss with the first principal components of its path alone."""
    values = {row["case"]: row["value"] for row in rows}
    lines = [
        [name, *(f"{values[f'{name}, {k} components of its path']:.4f}" for k in (0, *DIMS))]
        for name in RUNS
        if f"{name}, 0 components of its path" in values
    ]
    return markdown(["run", *map(str, (0, *DIMS))], lines)


def branches(rows: list[Row]) -> str:
    """A way to a gradient a line, a timestep a column."""
    cosines = {tuple(row["case"].split(", ", 1)): row["value"] for row in rows if row["metric"].startswith("cosine")}
    timesteps = dict.fromkeys(timestep for timestep, _ in cosines)
    lines = [
        [way, *(f"{cosines[timestep, way]:.3f}" for timestep in timesteps)]
        for way in dict.fromkeys(w for _, w in cosines)
    ]
    return markdown(["gradient", *timesteps], lines)


def heard(rows: list[Row]) -> str:
    """A range of timesteps a line."""
    wholes = list(dict.fromkeys(row["metric"] for row in rows))
    values = {(row["case"], row["metric"]): f"{row['value']:.3f} ± {row['spread']:.3f}" for row in rows}
    lines = [[case, *(values[case, what] for what in wholes)] for case in dict.fromkeys(case for case, _ in values)]
    return markdown(["timesteps", *wholes], lines)


def listened(rows: list[Row]) -> str:
    """A share a line: how many dimensions hold it, and how much of a gradient is in them."""
    values = {(row["case"], row["metric"]): row["value"] for row in rows if row["case"].startswith("share ")}
    lines = [
        [case.removeprefix("share "), f"{values[case, 'dimensions']:.0f}", f"{values[case, 'of single draws']:.1%}"]
        for case in dict.fromkeys(case for case, _ in values)
    ]
    return markdown(["share of ‖J‖²", "dimensions of 128", "of a gradient's squared length"], lines)


def paired(rows: list[Row]) -> str:
    """A partner a line: what of a draw's variance it shares."""
    lines = [[row["case"], f"{row['value']:.2f} ± {row['spread']:.2f}"] for row in rows if row["case"] != "itself"]
    return markdown(["a draw and", "of its variance"], lines)


def objectives(rows: list[Row]) -> str:
    """A trial a line."""
    return markdown(
        ["trial", "(CLIP-I + DINO) / 2"],
        [[row["case"].partition(" ")[2], f"{row['value']:.3f}"] for row in rows if row["metric"] == "objective"],
    )


def speeds(rows: list[Row]) -> str:
    """A case a line: both times and their ratio."""
    return _timed(rows, ["step", "batched, ms", "one after the other, ms", "times as fast"])


def real_speeds(rows: list[Row]) -> str:
    """As `speeds`, beside the ordinary step, and what ours reaches of the products' ceiling."""
    shares = {row["case"]: f"{row['value']:.0%}" for row in rows if row["metric"] == "share of the ceiling"}
    timed = [row for row in rows if row["metric"] == "seconds a step"]
    lines = [[*_times(row), shares.get(row["case"].partition(", beside ")[0], "")] for row in timed]
    return markdown(["step", "ours, ms", "the ordinary one, ms", "times as fast", "of the ceiling"], lines)


def _timed(rows: list[Row], header: list[str]) -> str:
    return markdown(header, [_times(row) for row in rows if row["metric"] == "seconds a step"])


def _times(row: Row) -> list[str]:
    return [row["case"], f"{1e3 * row['value']:.0f}", f"{1e3 * row['baseline']:.0f}", f"{row['ratio']:.2f}"]


def methods(rows: list[Row]) -> str:
    """A method a line: seconds of a step, and how fast that is beside the first of its kind."""
    lines = [
        [
            row["case"],
            row["metric"].removeprefix("seconds a "),
            f"{row['value']:.3g}",
            f"{1 / row['value']:.3g}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["method", "step", "s", "a second", "times as fast as the first"], lines)


def rates(rows: list[Row]) -> str:
    """Training steps a second beside the paper's."""
    timed = [row for row in rows if row["metric"] == "seconds a training step"]
    named = [(row["case"].split(maxsplit=2)[-1], 1 / row["value"]) for row in timed]
    told = [{"case": name, "metric": "steps_per_second", "value": rate} for name, rate in named]
    return beside(papers.SPEED, told)


def operations(rows: list[Row]) -> str:
    """A kernel's size a line: both times, their ratio and the share of the roofline."""
    share = {row["case"]: row["value"] for row in rows if row["metric"] == "share of the roofline"}
    lines = [
        [
            row["case"].rpartition(", ")[0],
            f"{1e3 * row['value']:.3g}",
            f"{1e3 * row['baseline']:.3g}",
            f"{row['ratio']:.2f}",
            f"{share[row['case']]:.0%}" if row["case"] in share else "",
        ]
        for row in rows
        if row["metric"] == "seconds a call"
    ]
    return markdown(["operation", "ours, ms", "the library's, ms", "times as fast", "of the roofline"], lines)


def planned(rows: list[Row]) -> str:
    """A recipe a line: what the plan says that a GPU needs."""
    by_metric = {
        metric: {row["case"]: row["value"] for row in rows if row["metric"] == metric}
        for metric in ("planned peak on a GPU", "planned peak of drawing on a GPU")
    }
    training, drawing = by_metric.values()
    lines = [[case, _gib(training[case]), _gib(drawing[case])] for case in training]
    return markdown(["recipe", "training, GiB", "drawing, GiB"], lines)


def measured(rows: list[Row]) -> str:
    """A phase a line: bytes that were allocated, and what the plan had said."""
    lines = [
        [row["case"], _gib(row["value"]), _gib(row["baseline"]), f"{row['value'] / row['baseline'] - 1:+.1%}"]
        for row in rows
        if "the plan as baseline" in row["metric"]
    ]
    return markdown(["recipe and phase", "measured, GiB", "planned, GiB", "difference"], lines)


def published(rows: list[Row]) -> str:
    """A method a line, GB: the paper's figure, that of a public script and what it is made of, and ours."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["metric"]: row for row in rows if row["case"] == case}
        size = {name: by[name]["value"] for name in ("resident", "gradients", "optimizer", "peak")}
        rest = size["peak"] - size["resident"] - size["gradients"] - size["optimizer"]
        used, paper = by[USED]["value"], by[USED]["baseline"]
        parts = (size["resident"], size["gradients"], size["optimizer"], rest, by[OURS]["value"])
        lines.append([case, _gb(paper), _gb(used), f"{used / paper - 1:+.0%}", *map(_gb, parts)])
    header = ["method", "the paper", "a public script", "difference"]
    return markdown([*header, "of it models", "gradients", "optimizer", "activations and temporaries", "ours"], lines)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.3f}"


def fidelities(rows: list[Row]) -> str:
    """A path and a mu, or its tangents, a line: both errors and the correlation with the exact derivative."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        rounding, truncation, correlation = (row["value"] for row in rows if row["case"] == case)
        path, way = _path_and_way(case)
        lines.append([path, way, f"{rounding:.2%}", f"{truncation:.1%}", f"{correlation:.3f}"])
    return markdown(["precision", "μ", "rounding", "truncation", "correlation"], lines)


def tangents(rows: list[Row]) -> str:
    """A path a line: a finite difference at the mu where it is nearest to the derivative, and the tangents."""
    values = {(row["case"], row["metric"].partition(",")[0]): row["value"] for row in rows}
    lines = []
    for path in dict.fromkeys(_path_and_way(row["case"])[0] for row in rows):
        ways = {way: case for case, _ in values for found, way in [_path_and_way(case)] if found == path}
        carried = ways.pop(CARRIED)
        best = max(ways, key=lambda way: values[ways[way], CORRELATION])
        finite = [values[ways[best], part] for part in ("rounding", "truncation")]
        error = values[carried, "rounding"]
        lines.append(
            [
                path,
                best,
                *(f"{value:.2%}" for value in finite),
                f"{values[ways[best], CORRELATION]:.3f}",
                f"{error:.2%}" if error > 1e-4 else f"{error:.1e}",
                f"{values[carried, CORRELATION]:.5f}",
            ]
        )
    header = ["precision", "best μ", "rounding", "truncation", "correlation", "tangents: error", "correlation"]
    return markdown(header, lines)


CORRELATION = "correlation with the exact derivative"


def _path_and_way(case: str) -> tuple[str, str]:
    """A row's precision, and its mu or that it is of tangents."""
    path, _, mu = case.removeprefix("tiny ").rpartition(" mu ")
    return (path, mu) if path else (case.removeprefix("tiny ").removesuffix(f" {CARRIED}"), CARRIED)


def batched(rows: list[Row]) -> str:
    """A method a line: subjects an hour by how many are in a batch, and how many times as many as one at a time."""
    told: dict[str, dict[str, str]] = {}
    for row in rows:
        method, count = row["case"].split(" a batch")[0].removeprefix("tiny ").split(", ")
        if row["metric"] == "subjects an hour":
            told.setdefault(method, {})[count] = f"{row['value']:.0f} ({row['ratio']:.2f})"
    counts = list(next(iter(told.values())))
    return markdown(["method", *counts], [[method, *own.values()] for method, own in told.items()])


def profiled(rows: list[Row]) -> str:
    """A way to take a step a line: its time, the device's, launches, and the kernels that take most."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        whole, at_work, launches, *kernels = [row for row in rows if row["case"] == case]
        told = "; ".join(f"{row['metric'].split('<')[0]} {1e3 * row['value']:.1f}" for row in kernels[:3])
        lines.append(
            [case, f"{1e3 * whole['value']:.1f}", f"{1e3 * at_work['value']:.1f}", f"{launches['value']}", told]
        )
    return markdown(["step", "ms", "of them at work", "kernels", "the kernels that take most, ms"], lines)


def halves(rows: list[Row]) -> str:
    """Half an autoencoder and what it stands beside a line: seconds and activations."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        seconds, peak = (row for row in rows if row["case"] == case)
        times = [f"{seconds['value']:.3g}", f"{seconds['baseline']:.3g}", f"{seconds['ratio']:.2f}"]
        lines.append([case, *times, *(f"{peak[key] / 2**20:.0f}" for key in ("value", "baseline"))])
    return markdown(["", "in bands, s", "the other, s", "times as fast", "in bands, MiB", "the other, MiB"], lines)


def plain(rows: list[Row]) -> str:
    """A figure a line."""
    lines = [[f"{row['case']}: {row['metric']}", f"{row['value']:.3g} {row['unit']}".strip()] for row in rows]
    return markdown(["what", "figure"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "compare": compared,
    "quality": scores,
    "ablation": scores,
    "subspace": scores,
    "timesteps": scores,
    "precision": scores,
    "forward": scores,
    "estimators": scores,
    "estimators:differences": differences,
    "search": scores,
    "search:differences": differences,
    "loras": scores,
    "paths": travelled,
    "paths:dims": truncated,
    "branches": branches,
    "heard": heard,
    "conditioning": listened,
    "pairs": paired,
    **{name: partial(beside, table) for name, table in papers.TABLES.items()},
    **{f"tune-{method}": objectives for method in AXES},
    "step": speeds,
    "step-sd15": real_speeds,
    "cuda/step-sd15": real_speeds,
    "methods-sd15": methods,
    "cuda/methods-sd15": methods,
    "cuda/methods-sd15:paper": rates,
    "memory-sd15:planned": planned,
    "memory-sd15:measured": measured,
    "memory-sd21:planned": planned,
    "memory-sdxl:planned": planned,
    "cuda/memory-sd15:measured": measured,
    "published": published,
    "several": batched,
    "cuda/profile-sd15": profiled,
    "cuda/profile-sd15:cost": cost.of_a_step,
    "cuda/methods-sd15:cost": cost.of_methods,
    "tiny": plain,
    "autoencoder": halves,
    "cuda/autoencoder": halves,
    "kernels": operations,
    "cuda/kernels": operations,
    "fidelity": fidelities,
    "fidelity:tangents": tangents,
    "cuda/fidelity": fidelities,
    "cuda/fidelity:tangents": tangents,
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


def write() -> None:
    """All documents and their plots."""
    for document in DOCUMENTS:
        document.write_text(render(document.read_text()))
    for name, (suite, draw) in plots.PLOTS.items():
        if results(suite).exists():
            figure = draw(json.loads(results(suite).read_text())["rows"])
            if figure is not None:
                figure.savefig(DOCS / "images" / f"{name}.png", dpi=130)
