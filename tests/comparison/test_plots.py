"""What a plot of memory and quality says of which point."""

from itertools import combinations

import pytest

from mep_lightning.comparison.plots import tradeoff


def row(method, size, score):
    scores = dict.fromkeys(("clip_i", "dino", "clip_t"), score)
    return {"method": method, "training_planned": size, "training_bytes": None, "batch": 1, "spread": {}, **scores}


@pytest.mark.parametrize("gap", [0.0005, 0.004])
def test_names_of_neighbours_do_not_meet(gap):
    """Four methods that take about as much and score about as high, between two that do not."""
    rows = [row(f"method_{n}", 2**20 * (43 + n), 0.46 + gap * n) for n in range(4)]
    figure = tradeoff([row("small", 2**23, 0.44), *rows, row("large", 2**27, 0.5)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["CLIP-I", "DINO", "CLIP-T"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["small", *(one["method"] for one in rows), "large"]
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_method_without_scores_or_memory_has_no_point():
    assert tradeoff([row("a", None, 0.5), row("b", 2**20, None)]) is None
    (axes, *_) = tradeoff([row("a", None, 0.5), row("b", 2**20, 0.4)]).axes
    assert [text.get_text() for text in axes.texts] == ["b"]
