"""What a plot of memory and quality says of which point."""

import json
from itertools import combinations

import pytest

from benchmarks.documents.tables import results
from mep_lightning.comparison.plots import extent, tradeoff

WANTED = ("clip_i", "dino", "clip_t", "training_planned", "training_bytes", "batch")


def row(method, size, score, grown=None):
    scores = dict.fromkeys(("clip_i", "dino", "clip_t"), score)
    return {"method": method, "training_planned": size, "training_bytes": grown, "batch": 1, "spread": {}, **scores}


@pytest.mark.parametrize("gap", [0.0005, 0.004])
def test_names_of_neighbours_do_not_meet(gap):
    """Four methods that take about as much and score about as high, between two that do not."""
    rows = [row(f"method_{n}", 2**20 * (43 + n), 0.46 + gap * n) for n in range(4)]
    figure = tradeoff([row("small", 2**23, 0.44), *rows, row("large", 2**27, 0.5)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["CLIP-I", "DINO", "CLIP-T"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["small", *(one["method"] for one in rows), "large"]
        boxes = [extent(text) for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_names_of_a_crowd_do_not_meet_either():
    """The eleven methods of the papers' tables as they lie on `tiny`."""
    lines = json.loads(results("compare").read_text())["rows"]
    known = {metric: {one["case"]: one["value"] for one in lines if one["metric"] == metric} for metric in WANTED}
    rows = [{key: known[key].get(name) for key in WANTED} | {"method": name, "spread": {}} for name in known["clip_i"]]
    figure = tradeoff(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [extent(text) for text in axes.texts]
        assert len(boxes) == 11 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_method_without_scores_or_memory_has_no_point():
    assert tradeoff([row("a", None, 0.5), row("b", 2**20, None)]) is None
    (axes, *_) = tradeoff([row("a", None, 0.5), row("b", 2**20, 0.4)]).axes
    assert [text.get_text() for text in axes.texts] == ["b"]


def test_planned_and_measured_peaks_share_no_axis():
    both, grown = [row("a", 2**20, 0.4, 2**21), row("b", None, 0.5, 2**22)], row("c", None, 0.3, 2**21)
    for rows, named, told in (
        (both, "ab", "measured"),
        (both[:1], "a", "planned"),
        ([*both, grown], "acb", "measured"),
    ):
        (axes, *_) = tradeoff(rows).axes
        assert "".join(text.get_text() for text in axes.texts) == named
        assert axes.get_xlabel() == f"MiB at the peak of training, {told}"
