"""The benchmark that runs `mep compare`: its figures, and the pictures taken from its folder."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import comparison, tables
from mep_lightning.comparison import table
from mep_lightning.comparison.folder import ComparisonFolder


def content(*methods):
    records = [
        {"method": method, "subject": subject, "seed": seed, "training_bytes": 2**20 * (1 + number)}
        | dict.fromkeys(("clip_t", "clip_i", "dino", "dino_inter"), number + seed / 10)
        for number, method in enumerate(methods)
        for subject in ("a", "b")
        for seed in (0, 1)
    ]
    records.append({"method": methods[0], "subject": "c", "seed": 0, "error": "out of memory", "kind": "memory"})
    return {"rows": table.rows(records, methods, {})}


def test_lines_are_those_of_the_table():
    rows = content("zoodip", "lora")["rows"]
    found = comparison.lines(comparison.rows({"rows": rows}))
    assert table.as_markdown(found) == table.as_markdown(rows)
    assert found[0]["spread"]["dino"] == pytest.approx(0.0707, abs=1e-4)
    assert tables.compared(comparison.rows({"rows": rows})).count("\n") == 4


def test_a_method_without_a_cell_has_no_row():
    assert comparison.rows(content("zoodip") | {"rows": table.rows([], ["zoodip"], {})}) == []


def test_the_matrix_shows_one_prompt_of_every_method(tmp_path):
    folder = ComparisonFolder(tmp_path)
    (folder.photos / "dog").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder.photos / "dog" / "0.png")
    drawn = folder.run("zoodip", "dog", 0) / "evaluation"
    drawn.mkdir(parents=True)
    for number, prompt, color in ((0, "a <sks> dog on grass", "green"), (1, "a <sks> dog in the snow", "blue")):
        about = PngInfo()
        about.add_text("prompt", prompt)
        Image.new("RGB", (64, 64), color).save(drawn / f"{number}-seed0.png", pnginfo=about)
    comparison.matrix(tmp_path, tmp_path / "sheet.png", ("zoodip", "lora"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        middle = sheet.height - 32
        seen = [sheet.getpixel((column * (comparison.SIDE + comparison.GAP) + 32, middle)) for column in range(3)]
    assert seen == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
