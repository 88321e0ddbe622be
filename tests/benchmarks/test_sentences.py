"""Figures that stand in sentences are the committed ones, as those in tables are."""

import json
import re

import pytest

from benchmarks.tables import DOCS, results
from mep_lightning.defaults import lookup

GIB = 2**30
README = DOCS.parent / "README.md"


def value(name, case, metric):
    rows = json.loads(results(name).read_text())["rows"]
    (found,) = [row["value"] for row in rows if (row["case"], row["metric"]) == (case, metric)]
    return found


def ratio(one, other, metric):
    return f"{value('quality', one, metric) / value('quality', other, metric):.0%}"


def planned(case):
    return f"{value('memory-sd15', case, 'planned peak on a GPU') / GIB:.2f}"


def run_peak(recipe):
    """The highest phase of a whole run on the GPU."""
    rows = json.loads(results("cuda/memory-sd15").read_text())["rows"]
    return f"{max(row['value'] for row in rows if row['case'].startswith(f'sd15 512 px {recipe} ')) / GIB:.2f}"


def seconds(variant):
    return value("quality", variant, "seconds")


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
SENTENCES = [
    (README, lambda: f"come to {ratio('zoodip', 'textual_inversion', 'clip_i')} of Textual Inversion's CLIP-I"),
    (README, lambda: f"and {ratio('zoodip', 'textual_inversion', 'dino')} of its DINO"),
    (
        README,
        lambda: (
            f"a token took {seconds('textual_inversion'):.0f} s by `textual_inversion`, "
            f"{seconds('textual_inversion_lite'):.0f} s by `textual_inversion_lite`, {seconds('zoodip_fast'):.0f} s by "
            f"`zoodip_fast` and {seconds('zoodip') / 60:.0f} minutes by `zoodip`"
        ),
    ),
    (
        README,
        lambda: (
            f"peaked at {run_peak('textual_inversion_lite')} GiB of a GPU's memory beside ZOODiP's {run_peak('zoodip')}"
        ),
    ),
    (
        README,
        lambda: (
            f"{minutes('zoodip_fast'):.1f} minutes by `zoodip_fast`, {minutes('zoodip'):.1f} by "
            f"`zoodip` ({1e3 * step('zoodip'):.1f} ms a step), {minutes('textual_inversion'):.0f} by Textual "
            f"Inversion and {minutes('textual_inversion_lite'):.0f} by `textual_inversion_lite`"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"planned at {planned(FAST)} GiB, beside ZOODiP's {planned(ZOODIP)} and Textual Inversion's {planned(TI)}"
        ),
    ),
    (
        DOCS / "memory.md",
        lambda: (
            f"on an int8 base, is planned at {planned(SELECTIVE)} GiB: "
            f"{1 - float(planned(SELECTIVE)) / float(planned(LORA)):.0%} below LoRA's backpropagation "
            f"at 512 px in fp32 ({planned(LORA)})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: f"{float(planned(ZOODIP)) / float(planned(TI)):.0%} on SD1.5 ({planned(ZOODIP)} and {planned(TI)} GiB)",
    ),
]


@pytest.mark.parametrize(
    ("document", "sentence"), SENTENCES, ids=[f"{one.stem} {n}" for n, (one, _) in enumerate(SENTENCES)]
)
def test_a_sentence_has_the_committed_figures(document, sentence):
    plain = re.sub(r"\s+", " ", document.read_text()).replace(" %", "%")
    assert sentence() in plain
