"""Tables of trained cells and of the studies that explain them: rows of a suite -> Markdown."""

from __future__ import annotations

from itertools import combinations

from benchmarks.documents import papers
from benchmarks.documents.markdown import markdown
from benchmarks.rows import Row
from benchmarks.studies.paths import COMPONENTS, DIMS, MARKS, RUNS
from benchmarks.trained.differences import Difference, signed
from benchmarks.trained.quality import SCORES

NUS = (1e-1, 1e-2, 1e-3, 1e-4)
NAMES = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dino_inter": "DINO inter",
    "heldout_loss": "held-out loss",
    "steps_per_second": "steps/s",
    "minutes": "minutes",
}


def scores(rows: list[Row]) -> str:
    """A variant a line: every score's mean ± spread over seeds, if there are some.

    What its training took is not there: cells of different days and machines have seconds that cannot be compared.
    """
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["metric"]: row for row in rows if row["case"] == case}
        size = f"{by['dino']['subjects']} × {by['dino']['seeds']}"
        several = by["dino"]["seeds"] > 1
        line = [case, size]
        for name in SCORES:
            places = 4 if name == "heldout_loss" else 3
            spread = f" ± {by[name]['spread']:.{places}f}" if several else ""
            line.append(f"{by[name]['value']:.{places}f}{spread}")
        lines.append(line)
    return markdown(["variant", "subjects × seeds", *(NAMES[name] for name in SCORES)], lines)


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
    counts, spreads = [], any("spread" in ours[name][metric] for name in paper.rows for metric in metrics)
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


def of_one_subject(rows: list[Row]) -> str:
    """What the paper's tables of one subject show against `SG`, beside ours and what one of our cells would show."""
    beyond = {(row["case"], row["metric"]): Difference(**row["beyond_first"]) for row in rows if "beyond_first" in row}
    first, lines = rows[0]["case"], {}
    for paper in papers.OF_ONE_SUBJECT:
        for name in paper.rows:
            for metric in ("clip_i", "dino"):
                ours = beyond.get((name, metric))
                if name == first or ours is None or ours.deviation is None:
                    continue
                theirs = paper.rows[name][metric] - paper.rows[first][metric]
                alike = ours.ahead if theirs > 0 else ours.cells - ours.ahead
                what = [signed(theirs, 3), ours.told(), f"{ours.deviation:.3f}"[1:], f"{alike} of {ours.cells}"]
                lines[name, metric] = [name, NAMES[metric], *what]
    header = [
        f"beyond {first}",
        "score",
        "the paper, one subject",
        "here",
        "deviation of one cell",
        "cells as the paper",
    ]
    return markdown(header, list(lines.values()))


def settings(rows: list[Row]) -> str:
    """CLIP-I by tau and nu of Subspace Gradient, the paper's in brackets: its tau is four times as large, for a token
    of six times as many dimensions."""
    ours = {row["case"]: row["value"] for row in rows if row["metric"] == "clip_i"}
    lines = []
    for tau, theirs in papers.SETTINGS.items():
        cells = [ours.get(f"τ {tau // 4}, ν {nu:g}") for nu in NUS]
        told = [f"{own:.3f} ({paper:.3f})" for own, paper in zip(cells, theirs, strict=True) if own is not None]
        if len(told) == len(NUS):
            lines.append([f"{tau // 4} ({tau})", *told])
    return markdown(["τ, ours (ZOODiP's Table 4)", *(f"ν {nu:g}" for nu in NUS)], lines)


def _figure(value: float) -> str:
    """Scores to the third place, other figures to the third digit."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def compared(rows: list[Row]) -> str:
    """A method a line, as in the table of `mep compare`."""
    from benchmarks.trained.comparison import lines
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
    """A run a line: the held-out loss of a token that keeps so many components of the vocabulary, or of its path."""
    values = {row["case"]: row["value"] for row in rows}
    lines = [
        [f"{name}, {what}", *(f"{values[f'{name}, {k} {what}']:.4f}" for k in (0, *DIMS))]
        for name in RUNS
        for what in COMPONENTS
        if f"{name}, 0 {what}" in values
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
