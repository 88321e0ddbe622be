"""Committed figures, as sentences of the documents put them."""

import json
from functools import cache
from itertools import pairwise
from statistics import mean

from benchmarks.documents import papers
from benchmarks.documents.tables import DOCS, results
from benchmarks.studies.paths import COMPONENTS, MARKS
from benchmarks.studies.published import ALONE, paper
from benchmarks.trained.differences import Difference, difference
from benchmarks.trained.quality import committed
from mep_lightning.defaults import lookup

MIB, GIB = 2**20, 2**30
README = DOCS.parent / "README.md"


def value(name, case, metric):
    rows = json.loads(results(name).read_text())["rows"]
    (found,) = [row["value"] for row in rows if (row["case"], row["metric"]) == (case, metric)]
    return found


def ratio(one, other, metric, suite="quality"):
    return f"{value(suite, one, metric) / value(suite, other, metric):.0%}"


def share(one, metric):
    """Of Textual Inversion's in the comparison of all methods."""
    return ratio(one, "textual_inversion", metric, "compare")


@cache
def cells(suite):
    return committed(suite, results(suite).with_suffix(".jsonl"))


def beyond(suite, one, other, metric):
    """What a variant scores beyond another, paired cell by cell."""
    return difference(cells(suite), one, other, metric).told(4 if metric == "heldout_loss" else 3)


@cache
def compared():
    """The cells of the comparison of all methods, as those of other suites are."""
    lines = map(json.loads, results("compare").with_suffix(".jsonl").read_text().splitlines())
    return [cell | {"variant": cell["method"], "index": cell["subject"]} for cell in lines]


def beyond_inversion(one, metric):
    """What a method scores there beyond Textual Inversion, paired cell by cell."""
    return difference(compared(), one, "textual_inversion", metric).told()


def of_inversion(one, metric):
    """That as a share of Textual Inversion's, with one standard error, in percent."""
    whole, part = (value("compare", name, metric) for name in ("textual_inversion", one))
    error = difference(compared(), one, "textual_inversion", metric).error
    return f"{100 * part / whole:.0f} ± {100 * error / whole:.0f}%"


def tuned(method, trial, metric):
    """A trial's mean over its subjects, none of which is reported."""
    lines = map(json.loads, results(f"tune-{method}").with_suffix(".jsonl").read_text().splitlines())
    return f"{mean(cell[metric] for cell in lines if cell['variant'] == trial):.3f}"[1:]


def from_first(suite, one, metric):
    """What a variant scores beyond its suite's first, as the committed figures have it."""
    rows = json.loads(results(suite).read_text())["rows"]
    (beyond_first,) = [row["beyond_first"] for row in rows if (row["case"], row["metric"]) == (one, metric)]
    return Difference(**beyond_first).told(4 if metric == "heldout_loss" else 3)


def planned(case):
    return f"{value('memory-sd15', case, 'planned peak on a GPU') / GIB:.2f}"


def short_of_paper(name):
    """What a public script without class photos takes less than the paper says."""
    return f"{1 - value('published', name, ALONE) / paper(name):.0%}"


def run_peak(recipe):
    """The highest phase of a whole run on the GPU."""
    rows = json.loads(results("cuda/memory-sd15").read_text())["rows"]
    return f"{max(row['value'] for row in rows if row['case'].startswith(f'sd15 512 px {recipe} ')) / GIB:.2f}"


def grown(method):
    """MiB by which a method's process grows in training, the median of cells."""
    return f"{value('compare', method, 'training_bytes') / MIB:.0f}"


def grown_each(method):
    """That of every cell that was measured, in order."""
    taken = sorted(cell["training_bytes"] for cell in compared() if cell["method"] == method and "memory_of" in cell)
    return [f"{size / MIB:.0f}" for size in taken]


def minutes_on_tiny(method):
    return value("compare", method, "minutes")


def on_tiny(method, case):
    """How long all steps of a method take there, in steps of ZOODiP's."""
    return lookup(method, "tiny", "int8")["max_steps"] / ratio_of_step(case)


def ratio_of_step(case):
    rows = json.loads(results("methods").read_text())["rows"]
    (found,) = [row["ratio"] for row in rows if row["case"] == f"tiny {case}"]
    return found


def on_path(case):
    return value("paths", case, "held-out loss")


def after(run, loss):
    """Forward passes after which a run first has this held-out loss, to a hundred, in a straight line between marks."""
    for before, then in pairwise(MARKS):
        above, below = (on_path(f"{run}, {mark} forward passes") for mark in (before, then))
        if above > loss >= below:
            return round(before + (then - before) * (above - loss) / (above - below), -2)
    raise AssertionError(f"{run} never comes to {loss}")


def at_end(run):
    return on_path(f"{run}, {MARKS[-1]} forward passes")


def half_way():
    """Between an untrained token's held-out loss and ZOODiP's last."""
    return (left("zoodip_fast", 0, OF_PATH) + at_end("zoodip")) / 2


def told(loss):
    return f"{loss:.4f}".removeprefix("0")


def left(run, count, components):
    return on_path(f"{run}, {count} {components}")


def less(metric, places):
    """By how many percent of Textual Inversion's `zoodip_fast` is below it."""
    part = value("quality", "zoodip_fast", metric) / value("quality", "textual_inversion", metric)
    return f"{100 * (1 - part):.{places}f}".removeprefix("0")


def of_subject(variant, subject):
    dino = mean(c["dino"] for c in cells("quality") if (c["variant"], c["subject"]) == (variant, subject))
    return f"{dino:.2f}".removeprefix("0")


def shorter(metric):
    return f"{value('quality', SHORTER, metric):.3f}".removeprefix("0")


SHORTER = "zoodip, 1,500 steps"
IN_AS_MANY = "quality", "zoodip_fast", SHORTER
PAPERS = "zoodip, the paper's τ and ν"
OF_WORDS, OF_PATH = COMPONENTS
PLAIN = "textual_inversion", "fp32 textual_inversion, as shipped"
LITE = "textual_inversion_lite", "int8 textual_inversion_lite"
PARTS = {6: "sixth", 7: "seventh", 8: "eighth"}


def step(method):
    return value("cuda/methods-sd15", f"sd15 int8 {method}", "seconds a training step")


def minutes(method):
    return step(method) * lookup(method, "sd1", "int8")["max_steps"] / 60


ZOODIP, TI, FAST = (
    "sd15 512 px zoodip in int8",
    "sd15 512 px textual_inversion in fp32",
    "sd15 512 px zoodip_fast in int8",
)
SELECTIVE, LORA = "sd15 512 px selective in int8", "sd15 512 px lora in fp32"
LONGER = "lr=1e-05 max_steps=1200"
SEARCHED = "conditioning subspace, prompt search first"
WIDER = ("estimators", "conditioning subspace, n=16", "conditioning subspace")
STARTED = ("estimators", SEARCHED, "conditioning subspace")
TANGENTS = ("forward", "bf16, tangents", "fp32, finite difference")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def lost_in_one_cell():
    """How many of the paper's differences of one subject are smaller than what a cell of ours departs from the mean."""
    rows = json.loads(results("ablation").read_text())["rows"]
    beyond = {(row["case"], row["metric"]): Difference(**row["beyond_first"]) for row in rows if "beyond_first" in row}
    theirs = {
        (name, metric): paper.rows[name][metric] - paper.rows["SG"][metric]
        for paper in papers.OF_ONE_SUBJECT
        for name in paper.rows
        for metric in ("clip_i", "dino")
        if name not in ("SG", "one-point, differences")
    }
    smaller = sum(abs(value) < beyond[key].deviation for key, value in theirs.items())
    return f"ten differences other than one-point's {NUMBERS[smaller]} are smaller" if len(theirs) == 10 else ""
