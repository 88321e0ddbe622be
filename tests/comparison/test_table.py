"""The table: means and spreads of cells, in three forms."""

import csv
import io

import pytest

from mep_lightning.comparison import table
from mep_lightning.run_folder import kind_of

FIGURES = {"training_bytes": 3 * 2**20, "inference_bytes": None, "storage": 700, "steps": 5, "steps_per_second": 2.0}
FIGURES |= {"minutes": 0.5, "seconds_per_image": 1.25}


def record(method, subject, seed, score, **figures):
    scores = {"clip_t": score, "clip_i": score, "dino": score, "dino_inter": None}
    return {"method": method, "subject": subject, "seed": seed, **scores, **FIGURES, **figures}


RECORDS = [
    record("a", "ball", 0, 0.2),
    record("a", "cube", 0, 0.4),
    record("a", "ball", 1, 0.5, training_bytes=5 * 2**20),
    record("a", "cube", 1, 0.5, minutes=2.5),
    {"method": "a", "subject": "fish", "seed": 1, "error": "out of memory", "kind": "memory"},
    record("b", "ball", 0, float("nan")),
]


@pytest.fixture
def rows():
    return table.rows(RECORDS, ["b", "a", "c"], {"a": {"training_planned": 2**30, "inference_planned": 2**20}})


def test_scores_are_means_over_seeds_of_means_over_subjects(rows):
    _, a, _ = rows
    assert a["clip_i"] == pytest.approx((0.3 + 0.5) / 2)
    assert a["spread"]["clip_i"] == pytest.approx(0.2 / 2**0.5)
    assert (a["cells"], a["failed"], a["failures"]) == (4, 1, {"memory": 1})
    assert a["training_bytes"] == 5 * 2**20 and a["minutes"] == 0.5 and a["training_planned"] == 2**30


@pytest.mark.parametrize(("device", "bytes_"), [("cpu", 3 * 2**20), ("NVIDIA H100", 9 * 2**20)])
def test_of_memory_the_largest_is_given_or_on_a_cpu_the_median(device, bytes_):
    sizes = [9 * 2**20, 3 * 2**20, 2 * 2**20]
    records = [record("a", "ball", seed, 0.2, training_bytes=size, device=device) for seed, size in enumerate(sizes)]
    unmeasured = record("a", "star", 0, 0.2, training_bytes=None, device="NVIDIA H200")
    (row,) = table.rows([*records, unmeasured], ["a"], {})
    assert row["training_bytes"] == bytes_
    batched = [record("a", "cube", seed, 0.2, training_bytes=2**30, device=device, batch=4) for seed in range(2)]
    (row,) = table.rows([*records, *batched], ["a"], {})
    assert row["training_bytes"] == 2**30


def test_memory_and_times_are_of_the_device_that_most_cells_ran_on():
    here = [record("a", "ball", seed, 0.2, device="cpu", minutes=10.0, training_bytes=2**20) for seed in range(2)]
    there = [record("a", "cube", seed, 0.4, device="NVIDIA H200", minutes=1.0) for seed in range(3)]
    (row,) = table.rows([*here, *there], ["a"], {})
    assert (row["minutes"], row["training_bytes"], row["cells"]) == (1.0, 3 * 2**20, 5)
    (row,) = table.rows([*here, *there[:1]], ["a"], {})
    assert (row["minutes"], row["training_bytes"]) == (10.0, 2**20)
    assert row["clip_i"] == pytest.approx((0.3 + 0.2) / 2), "scores are of all"


def test_what_is_not_known_is_none(rows):
    b, a, c = rows
    assert [row["method"] for row in rows] == ["b", "a", "c"]
    assert b["clip_i"] is None and b["training_planned"] is None and a["inference_bytes"] is None
    assert c["cells"] == c["failed"] == 0 and c["dino"] is None


def test_markdown_shows_columns_of_which_something_is_known(rows):
    lines = table.as_markdown(rows).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert "DINO inter" not in header and "drawing" not in header and header[-1] == "cells"
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[0] == "a" and cells[header.index("CLIP-I")] == "0.400 ± 0.141"
    assert cells[header.index("training, planned")] == "1.00 GiB" and cells[-1] == "4 (1 out of memory)"
    assert cells[header.index("file")] == "0.70 kB"


def test_a_table_says_how_many_trained_together_where_any_did(rows):
    assert "cells a batch" not in table.as_markdown(rows) and table.TOGETHER_LEGEND not in table.legend(rows, ["cpu"])
    batched = [record("a", "ball", 0, 0.2, batch=4), record("a", "cube", 0, 0.2, batch=1), record("b", "ball", 0, 0.2)]
    found = table.rows([*batched, record("b", "cube", 0, 0.2, batch=1)], ["a", "b"], {})
    assert [row["batch"] for row in found] == [4, 1]
    lines = table.as_markdown(found).splitlines()
    place = [cell.strip() for cell in lines[0].split("|")].index("cells a batch")
    assert [lines[line].split("|")[place].strip() for line in (2, 3)] == ["4", "1"]
    assert table.legend(found, ["cpu"]).endswith(table.TOGETHER_LEGEND)
    assert [line["batch"] for line in csv.DictReader(io.StringIO(table.as_csv(found)))] == ["4", "1"]
    assert "batch" not in table.shown(found[1:])


def test_the_legend_says_what_of_memory_was_measured_where(rows):
    drawn = [row | {"inference_bytes": 5} for row in rows]
    assert [table.DRAWING_LEGEND in table.legend(one, ["cpu"]) for one in (rows, drawn)] == [False, True]
    grew, out = "how much a cell's process grew", "what torch's allocator had out"
    for kinds, told in (["cpu"], [True, False]), (["cuda"] * 2, [False, True]), (["cuda", "cpu"], [True, True]):
        assert [text in table.legend(rows, kinds) for text in (grew, out)] == told


def test_a_table_of_unequal_cells_says_so_and_whose_are_fewer():
    even = [record(method, subject, 0, 0.5) for method in "ab" for subject in ("ball", "house")]
    failed = {"method": "b", "subject": "house", "seed": 0, "error": "killed", "kind": "time"}
    assert "same cells" not in table.legend(table.rows(even, ["a", "b"], {}), ["cpu"])
    found = table.rows([*even[:3], failed], ["a", "b", "c"], {})
    assert [row["lacking"] for row in found] == [0, 1, 2]
    assert "Methods do not have the same cells here (b lacks 1): " in table.legend(found, ["cpu"])
    short = [
        (line["failed"], line["out_of_time"], line["out_of_memory"])
        for line in csv.DictReader(io.StringIO(table.as_csv(found)))
    ]
    assert short == [("0", "0", "0"), ("1", "1", "0"), ("0", "0", "0")]


@pytest.mark.parametrize(("size", "text"), [(704, "0.70 kB"), (168_500, "168.50 kB"), (1_280_000, "1.28 MB")])
def test_files_are_told_in_decimal_units_as_the_papers_are(size, text):
    (row,) = table.rows([record("a", "ball", 0, 0.5, storage=size)], ["a"], {})
    assert table.written(row, "storage") == text


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("mps", "cpu"), ("NVIDIA H100", "cuda")])
def test_where_memory_is_the_processs_and_where_the_allocators(device, kind):
    assert kind_of(device) == kind


def test_csv_has_plain_numbers(rows):
    found = list(csv.DictReader(io.StringIO(table.as_csv(rows))))
    assert float(found[1]["clip_i"]) == pytest.approx(0.4) and found[1]["clip_i_spread"].startswith("0.14")
    assert found[1]["training_bytes"] == str(5 * 2**20) and found[0]["clip_i"] == ""
