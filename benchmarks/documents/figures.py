"""Tables of speed, memory and rounding: rows of a suite -> Markdown."""

from __future__ import annotations

from benchmarks.documents import papers
from benchmarks.documents.markdown import markdown
from benchmarks.documents.scores import beside
from benchmarks.performance.fidelity import CARRIED
from benchmarks.rows import Row
from benchmarks.studies.published import KEPT, MB, OURS, USED


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
    """A method a line, GB: the paper's figure, a public script's and what it is made of, and ours; MB of files."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["metric"]: row for row in rows if row["case"] == case}
        size = {name: by[name]["value"] for name in ("resident", "gradients", "optimizer", "peak")}
        rest = size["peak"] - size["resident"] - size["gradients"] - size["optimizer"]
        used, paper = by[USED]["value"], by[USED]["baseline"]
        parts = (size["resident"], size["gradients"], size["optimizer"], rest, by[OURS]["value"])
        files = [f"{by[KEPT][key] / MB:.4g}" if KEPT in by else "" for key in ("baseline", "value")]
        lines.append([case, _gb(paper), _gb(used), f"{used / paper - 1:+.0%}", *map(_gb, parts), *files])
    header = ["method", "the paper", "a public script", "difference"]
    header += ["of it models", "gradients", "optimizer", "activations and temporaries", "ours"]
    return markdown([*header, "file, MB: the paper", "ours"], lines)


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
