"""The pictures of docs/ show what their rows hold."""

import pytest

from benchmarks.documents import plots, scores
from benchmarks.trained.variants import RANGES


def held_out(case, value):
    return {"case": case, "metric": "held-out loss", "value": value}


PATHS = [
    held_out("textual_inversion, 450 forward passes", 0.16),
    held_out("textual_inversion, 900 forward passes", 0.15),
    held_out("zoodip, 450 forward passes", 0.17),
    {"case": "zoodip", "metric": "share of the path's dimensions kept", "value": 0.25},
    *(held_out(f"textual_inversion, {k} components of its path", 0.16 - k / 1e4) for k in (0, *plots.DIMS)),
    *(held_out(f"textual_inversion, {k} components of the vocabulary", 0.15 - k / 1e4) for k in (0, *plots.DIMS)),
]


def test_paths_over_forward_passes_and_over_components():
    speed, dims = plots.paths(PATHS).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in speed.lines}
    assert drawn["textual_inversion"] == [[450, 0.16], [900, 0.15]] and drawn["zoodip"] == [[450, 0.17]]
    assert drawn["zoodip_fast"] == []
    words, along, begin = dims.lines
    assert [line.get_text() for line in dims.get_legend().texts] == [
        "textual_inversion, components of the vocabulary",
        "textual_inversion, components of its path",
    ]
    assert begin.get_label() == "where tokens begin" and set(begin.get_ydata()) == {0.16}
    assert along.get_xydata()[0].tolist() == [1, pytest.approx(0.1599)]
    assert words.get_xydata()[0].tolist() == [1, pytest.approx(0.1499)]
    assert "| zoodip | 0.1700 |  |" in scores.travelled(PATHS) and "| 0.25 |" in scores.travelled(PATHS)
    words, along = scores.truncated(PATHS).splitlines()[2:]
    assert along.startswith("| textual_inversion, components of its path | 0.1600 | 0.1599 |")
    assert words.startswith("| textual_inversion, components of the vocabulary | 0.1500 | 0.1499 |")


def test_every_range_of_timesteps_has_its_field():
    rows = [{"case": name, "metric": "dino", "value": i / 10} for i, name in enumerate(RANGES)]
    field = plots.timesteps(rows).axes[2]
    assert field.get_title() == "DINO"
    assert sorted(text.get_text() for text in field.texts) == [f"{i / 10:.3f}" for i in range(len(RANGES))]
    grid = field.images[0].get_array()
    assert grid[0, 0] == pytest.approx(list(RANGES).index("0..1000") / 10)  # up is later, right is from later on
    assert grid[-1, 0] == pytest.approx(list(RANGES).index("0..250") / 10)


def test_a_lora_over_the_share_that_is_cut_out():
    cases = {"untrained": 0.1, "lora": 0.5, "hollowed 90%": 0.3, "hollowed 20%": 0.4, "selective": 0.2}
    rows = [
        {"case": case, "metric": metric, "value": value, "spread": 0.01}
        for case, value in cases.items()
        for metric in ("clip_i", "dino")
    ]
    for axes in plots.hollowed(rows).axes:
        curve, untrained = axes.lines[0], axes.lines[-1]
        assert curve.get_xydata().tolist() == [[0, 0.5], [20, 0.4], [90, 0.3]]
        assert set(untrained.get_ydata()) == {0.1}
