"""The documents' tables are those of the committed figures."""

import json

import pytest

from benchmarks.documents import figures, papers, scores, tables
from benchmarks.trained.comparison import METHODS
from benchmarks.trained.quality import SCORES
from benchmarks.trained.variants import SUITES

TEXT = "Before.\n\n<!-- table: step -->\nold\n<!-- end -->\n\nAfter.\n"


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_hold_the_figures_as_they_are(document):
    text = document.read_text()
    assert tables.render(text) == text, "write it anew: python -m benchmarks tables"


@pytest.mark.parametrize("name", [name for name in tables.TABLES if tables.results(name).exists()])
def test_every_measured_table_is_in_a_document(name):
    assert any(f"<!-- table: {name} -->\nMeasured on " in path.read_text() for path in tables.DOCUMENTS)


def test_only_what_is_between_the_marks_is_written_anew(tmp_path):
    row = {"case": "RGE n=2", "metric": "seconds a step", "value": 0.0123, "baseline": 0.0246, "ratio": 2.004}
    (tmp_path / "step.json").write_text(json.dumps({"device": "a CPU", "torch": "2", "date": "today", "rows": [row]}))
    text = tables.render(TEXT, tmp_path)
    assert "| RGE n=2 | 12 | 25 | 2.00 |\n" in text
    assert "old" not in text and text.startswith(
        "Before.\n\n<!-- table: step -->\nMeasured on a CPU, torch 2, today.\n\n| step |"
    )
    assert text.endswith("|\n<!-- end -->\n\nAfter.\n")
    assert tables.render(text, tmp_path) == text


def test_a_table_without_figures_says_so(tmp_path):
    text = tables.render(TEXT, tmp_path)
    assert "<!-- table: step -->\nNot measured yet.\n<!-- end -->" in text


def test_every_table_has_a_place():
    texts = [path.read_text() for path in tables.DOCUMENTS]
    assert not [name for name in tables.TABLES if not any(f"<!-- table: {name} -->\n" in text for text in texts)]


def test_a_papers_table_stands_beside_ours():
    paper = papers.Table("Table 9", {"a": {"dino": 0.5}, "b": {"dino": 0.6}, "c": {"dino": 0.7}})
    values = {"a": (0.10, 0.05), "b": (0.12, 0.01), "c": (0.08, 0.01)}
    rows = [{"case": k, "metric": "dino", "value": v, "spread": spread} for k, (v, spread) in values.items()]
    text = scores.beside(paper, rows)
    assert "| ours (Table 9) | DINO |\n" in text and "| b | 0.120 (0.600) |\n" in text
    assert text.endswith("DINO 1 of 3 (0 of 1).\n")  # a < b is chance, c < a too, c < b is plainly the other way round
    assert scores.beside(paper, rows[:2]) == "Not measured yet.\n"
    alone = [{key: value for key, value in row.items() if key != "spread"} for row in rows]
    assert scores.beside(paper, alone).endswith("Pairs in the paper's order: DINO 1 of 3.\n")  # one seed has no spread


def test_settings_of_the_subspace_stand_beside_the_papers_of_four_times_the_steps():
    nus = ("0.1", "0.01", "0.001", "0.0001")
    rows = [{"case": f"τ 32, ν {nu}", "metric": "clip_i", "value": 0.1 * place} for place, nu in enumerate(nus)]
    rows += [
        {"case": "τ 8, ν 0.1", "metric": "clip_i", "value": 0.5},
        {"case": "τ 32, ν 0.1", "metric": "dino", "value": 1},
    ]
    header, _, *lines = scores.settings(rows).splitlines()
    assert header.endswith("| ν 0.1 | ν 0.01 | ν 0.001 | ν 0.0001 |")
    assert lines == ["| 32 (128) | 0.000 (0.736) | 0.100 (0.735) | 0.200 (0.759) | 0.300 (0.716) |"]


def test_a_step_is_told_by_what_it_stood_beside_and_by_the_papers_rate():
    seconds = {
        "zoodip": 0.02,
        "zoodip, launched one by one": 0.1,
        "textual_inversion": 0.2,
        "tuneqdm": 0.25,
        "gf_ti": 0.5,
    }
    rows = [
        {"case": f"sd15 int8 {case}", "metric": "seconds a training step", "value": value, "ratio": 0.02 / value}
        for case, value in seconds.items()
    ]
    text = figures.methods(rows)
    assert "| sd15 int8 zoodip | training step | 0.02 | 50 | 1.00 |\n" in text
    assert "| sd15 int8 textual_inversion | training step | 0.2 | 5 | 0.10 |\n" in text
    text = figures.rates(rows)
    assert "| zoodip | 50 (16.1) |\n" in text and "| textual_inversion | 5 (9.42) |\n" in text
    assert text.endswith("Pairs in the paper's order: steps/s 6 of 6.\n")
    assert figures.rates(rows[:3]) == "Not measured yet.\n"


@pytest.mark.parametrize("place", papers.TABLES)
def test_a_papers_variants_are_those_of_the_suite(place):
    known = SUITES | {"compare": dict.fromkeys(METHODS)}
    assert set(papers.TABLES[place].rows) <= set(known[place.partition(":")[0]])


def test_memory_tables_tell_plan_and_measurement_apart():
    rows = [
        {"case": "sd15 zoodip", "metric": "planned peak on a GPU", "value": 2**30},
        {"case": "sd15 zoodip", "metric": "planned peak of drawing on a GPU", "value": 2**29},
        {"case": "sd15 step", "metric": "peak on cpu, the plan as baseline", "value": 2**30, "baseline": 2**31},
    ]
    assert "| sd15 zoodip | 1.000 | 0.500 |\n" in figures.planned(rows)
    assert "| sd15 step | 1.000 | 2.000 | -50.0% |\n" in figures.measured(rows)


def test_scores_come_with_their_spread():
    rows = [
        {"case": case, "metric": metric, "value": value, "spread": 0.0125, "subjects": 4, "seeds": 3}
        for case, value in (("zo", 0.25), ("zo+sg", 0.5))
        for metric in SCORES
    ]
    lines = scores.scores(rows).splitlines()
    assert lines[0].startswith("| variant | subjects × seeds | CLIP-T | CLIP-I | DINO |")
    told = dict.fromkeys(SCORES, "0.250 ± 0.013") | {"heldout_loss": "0.2500 ± 0.0125"}
    assert lines[2] == "| zo | 4 × 3 | " + " | ".join(told.values()) + " |"
    assert lines[3].startswith("| zo+sg | 4 × 3 | 0.500")
    alone = scores.scores([row | {"seeds": 1} for row in rows]).splitlines()
    assert alone[2] == "| zo | 4 × 1 | 0.250 | 0.250 | 0.250 | 0.250 | 0.2500 |"  # one seed has no spread
