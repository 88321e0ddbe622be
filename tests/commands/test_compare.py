"""`mep compare`: cells are trained and scored once, failures are lines of the table, and all of it is on one page."""

import json
from pathlib import Path

import pytest

from mep_lightning.cli import main

SHORT = ["--subjects", "1", "--max-steps", "2", "--images-per-prompt", "1", "--threads", "1", "--out", "out"]


def compare(*words):
    return main(["compare", *SHORT, *words])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison in which one method cannot work."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("<b>broken.yaml").write_text(Path(recipe("lora")).read_text().replace("to_q, ", "to_x, "))
        assert compare("--methods", "textual_inversion,lora", "<b>broken.yaml") == 0
    return folder


def recipe(name):
    from mep_lightning.commands.recipes import find_recipe

    return find_recipe(name)


@pytest.mark.slow
def test_every_cell_is_a_run_with_scores(compared):
    content = json.loads((compared / "out/table.json").read_text())
    ti, lora, broken = content["rows"]
    assert [row["method"] for row in content["rows"]] == ["textual_inversion", "lora", "<b>broken"]
    for row in (ti, lora):
        assert row["cells"] == 1 and row["failed"] == 0 and row["steps"] == 2
        assert -1 <= row["dino"] <= 1 and row["training_bytes"] > row["training_planned"] / 4 > 0
        assert row["inference_planned"] > 0 and row["minutes"] > 0
    assert lora["storage"] > 100 * ti["storage"] > 0
    assert (broken["cells"], broken["failed"], broken["dino"]) == (0, 1, None)
    (failure,) = content["failures"]
    assert "LoRA.targets: 'to_x' is the name of no layer there" in failure["error"]
    run = compared / "out/runs/lora/ball-0-0"
    assert (run / "metrics.json").exists() and (run / "adapter").is_dir() and not (run / "checkpoints").exists()


def test_the_page_shows_it_all_and_escapes_what_users_typed(compared):
    page = (compared / "out/report.html").read_text()
    assert "&lt;b&gt;broken" in page and "<b>broken" not in page
    assert page.count("<svg") == 2 and page.count("data:image/png") >= 5 + 2 * 3
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_what_is_done_stays_done_and_more_may_be_added(compared, monkeypatch, capsys):
    monkeypatch.chdir(compared)
    before = Path("out/cells.jsonl").read_text()
    assert compare("--methods", "textual_inversion,lora") == 0
    assert "2 cells, 2 of them done" in capsys.readouterr().out
    assert Path("out/cells.jsonl").read_text() == before
    assert compare("--methods", "textual_inversion", "gf_ti", "--seeds", "1") == 0
    assert "2 cells, 1 of them done" in capsys.readouterr().out
    assert Path("out/cells.jsonl").read_text().startswith(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "zoodipp"], "--methods zoodipp: there is no such method; did you mean zoodip? There are"),
        (["--methods", "lora,lora"], "--methods lora: lora is named twice"),
        (["--methods", "lora", "--seeds", "0"], "--seeds is 0; use 1 or more"),
        (["--methods", "lora", "--only", "dog"], "--only chooses from --data ROOT"),
        (["--methods", "lora", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--methods", "lora", "--subjects", "31", "--out", "new"], "--subjects 31: the tiny world has 1 to 30"),
        (["--methods", "lora", "--max-steps", "3"], "--out out holds a comparison with max_steps 2, not 3"),
        (["--methods", "lora", "--timeout", "-1"], "--timeout is -1.0; use minutes above 0"),
    ],
)
def test_mistakes_are_one_sentence(compared, words, message, monkeypatch, capsys):
    monkeypatch.chdir(compared)
    assert compare(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not Path("new").exists()
