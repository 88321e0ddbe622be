"""Grids: what is drawn can be taken out again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mep_lightning.evaluation import grid


def flat(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_a_saved_grid_comes_back_with_its_pictures_and_what_they_are(tmp_path):
    colors = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]
    rows = [grid.Row("first", [flat(c) for c in colors[0]]), grid.Row("", [flat(c) for c in colors[1]], ["a", "ä <b>"])]
    path = grid.save(grid.draw(rows, prompts=["a", "ä <b>"], step=3), tmp_path / "new" / "grid.png")
    loaded = grid.load(path)
    assert loaded.info == {"prompts": ["a", "ä <b>"], "step": 3}
    for row in range(2):
        for cell, color in zip(loaded.cells(row), colors[row], strict=True):
            assert cell.size == (192, 192)
            assert (np.asarray(cell) == color).all()


def test_small_pictures_grow_by_a_whole_factor_and_large_ones_shrink():
    sizes = {8: 192, 64: 192, 100: 200, 192: 192, 300: 300, 1024: 512}
    for side, cell in sizes.items():
        (picture,) = grid.draw([grid.Row("", [flat((1, 2, 3), (side, side))])]).cells()
        assert picture.size == (cell, cell)


def test_proportions_are_kept():
    (picture,) = grid.draw([grid.Row("", [flat((0, 0, 0), (200, 100))])]).cells()
    pixels = np.asarray(picture)
    assert (pixels[60:140] == 0).all()
    assert (pixels[:45] == 255).all()
    assert (pixels[155:] == 255).all()


def test_pictures_captions_and_headings_do_not_overlap():
    text = "a very long caption that goes on and on and on and never seems to want to end at all " * 3
    drawn = grid.draw([grid.Row("one", [flat((9, 9, 9))] * 3, [text] * 3), grid.Row("two", [flat((8, 8, 8))] * 2)])
    for row, value in ((0, 9), (1, 8)):
        assert all((np.asarray(cell) == value).all() for cell in drawn.cells(row))
    left, _top, right, bottom = drawn.boxes[0][0]
    below = np.asarray(drawn.image.crop((left, bottom, right, drawn.boxes[1][0][1])))
    assert (below < 200).any()  # the caption is there
    assert (np.asarray(drawn.image)[:, -grid.MARGIN :] == 255).all()  # and stays on the page


@pytest.mark.parametrize(
    "text",
    ["a brown and orange checkered fish with a cyan cross", "W" * 40, "word " * 100_000, " "],
    ids=["words", "one word", "a book", "nothing"],
)
def test_a_caption_stays_below_its_own_picture(text):
    drawn = grid.draw([grid.Row("", [flat((9, 9, 9))] * 2, [text] * 2)])
    right, beside = drawn.boxes[0][0][2], drawn.boxes[0][1][0]
    assert (np.asarray(drawn.image)[:, right:beside] == 255).all()


def test_what_is_no_grid_is_not_taken_for_one(tmp_path):
    flat((0, 0, 0)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    assert [grid.load(tmp_path / name) for name in ("plain.png", "broken.png", "missing.png")] == [None] * 3
