"""`mep compare`: cells are trained and scored once, failures are lines of the table, and all of it is on one page."""

import html
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from mep_lightning.cli import main
from mep_lightning.commands.compare import _sizes
from mep_lightning.commands.compare_request import INSTEAD, words_of_fit
from mep_lightning.comparison.cells import Cell, run
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.preflight import OWN_OF_A_CELL
from mep_lightning.comparison.table import TOGETHER_LEGEND
from mep_lightning.errors import UserError

SHORT = ["--subjects", "1", "--max-steps", "2", "--images-per-prompt", "1", "--threads", "1", "--out", "out"]
SHORT += ["--prompts", "prompts.txt", "--fit=--samples.steps 2"]


def compare(*words):
    return main(["compare", *SHORT, *words])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison in which one method cannot work."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("prompts.txt").write_text("a photo of a {}\na {} on snow\na {} at night\n")
        Path("<b>broken.yaml").write_text(Path(recipe("lora")).read_text().replace("to_q, ", "to_x, "))
        assert compare("--methods", "textual_inversion,lora", "<b>broken.yaml") == 1
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


def test_the_table_and_the_page_say_where_memory_was_measured(compared):
    assert all(
        json.loads(line).get("device") in ("cpu", None)
        for line in (compared / "out/cells.jsonl").read_text().splitlines()
    )
    for name in ("table.md", "report.html"):
        text = html.unescape((compared / "out" / name).read_text())
        assert "measured on a CPU is by how much a cell's process grew" in text and "allocator" not in text


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
    table = json.loads(Path("out/table.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["textual_inversion", "lora", "<b>broken"], "all that is there"
    assert compare("--methods", "textual_inversion", "gf_ti", "--seeds", "1") == 0
    assert "2 cells, 1 of them done" in capsys.readouterr().out
    assert Path("out/cells.jsonl").read_text().startswith(before)


class Here:
    """An engine that runs batches in this process."""

    def __init__(self):
        self.given = []

    def run_all(self, batches, logs):
        for batch in batches:
            self.given.append([cell.subject for cell in batch])
            yield from run(batch)


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    """A comparison of two subjects one at a time, and one of three of which the first was done when the others came."""
    words = ["compare", "--methods", "textual_inversion", "--max-steps", "5", "--images-per-prompt", "1"]
    words += ["--prompts", "prompts.txt", "--fit=--samples.steps 1", "--out"]
    engine, folder = Here(), tmp_path_factory.mktemp("batched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("mep_lightning.commands.compare._engine", lambda *_: engine)
        Path("prompts.txt").write_text("a photo of a {}\n")
        assert main([*words, "alone", "--subjects", "2"]) == 0
        shutil.copytree("alone", "together")
        done = Path("together/cells.jsonl")
        done.write_text(done.read_text().splitlines(keepends=True)[0])
        shutil.rmtree("together/runs/textual_inversion/cube-0-0")
        assert main([*words, "together", "--subjects", "3", "--subjects-per-batch", "2"]) == 0
    assert engine.given == [["ball-0"], ["cube-0"], ["cube-0", "mug-0"]]
    return folder


def cells_of(out):
    return {line["subject"]: line for line in map(json.loads, (out / "cells.jsonl").read_text().splitlines())}


def test_cells_of_a_batch_are_what_they_are_alone(batched):
    alone, together = (cells_of(batched / out) for out in ("alone", "together"))
    assert together["ball-0"] == alone["ball-0"], "done, and left so"
    assert [together[name]["batch"] for name in ("ball-0", "cube-0", "mug-0")] == [1, 2, 2]
    mine, theirs = together["cube-0"], alone["cube-0"]
    assert mine.keys() == theirs.keys()
    for score in ("clip_t", "clip_i", "dino"):
        assert mine[score] == pytest.approx(theirs[score], abs=1e-3)
    assert (mine["steps"], mine["storage"]) == (theirs["steps"], theirs["storage"])
    token, others = (
        load_file(batched / out / "runs/textual_inversion/cube-0-0/adapter/learned_embeds.safetensors")["<sks>"]
        for out in ("alone", "together")
    )
    assert (token - others).norm() < 1e-3 and (token - others).norm() < 0.01 * token.norm()


def test_the_table_and_the_page_say_how_many_trained_together(batched):
    (row,) = json.loads((batched / "together/table.json").read_text())["rows"]
    (alone,) = json.loads((batched / "alone/table.json").read_text())["rows"]
    assert (row["cells"], row["batch"], alone["batch"]) == (3, 2, 1)
    assert row["training_planned"] > alone["training_planned"] + 5e6, "of the batch, as what is measured"
    assert row["inference_planned"] == pytest.approx(alone["inference_planned"], rel=0.05)
    for name in ("table.md", "report.html"):
        texts = [html.unescape((batched / out / name).read_text()) for out in ("together", "alone")]
        assert [TOGETHER_LEGEND in text and "cells a batch" in text for text in texts] == [True, False]
    assert "textual_inversion, 2 a batch" in (batched / "together/report.html").read_text()


def test_methods_that_cannot_be_batched_are_named_once(tmp_path, capsys):
    def cell(method, subject):
        run = tmp_path / method / subject
        fit = ["--config", method, "--run", str(run), "--data.path", "photos", "--data.class_word", "ball"]
        return Cell(method, subject, 0, run, fit, [])

    cells = [cell(method, subject) for subject in "ab" for method in ("lora", "zoodip", "gf_ti", "hollowed_net")]
    assert _sizes(cells, 3) == {"zoodip": 3}
    lora = "its adapter is LoRA"
    line = f"One at a time: lora ({lora}), gf_ti (its estimator is CMAES), hollowed_net ({lora}).\n"
    assert capsys.readouterr().out == line
    assert _sizes(cells, 1) == {} and capsys.readouterr().out == ""


class Told:
    """An engine whose cells all come to the same."""

    def __init__(self, *records):
        self.records, self.before = records, []

    def run_all(self, batches, logs):
        for (cell,), record in zip(batches, self.records, strict=False):
            table = Path("told/table.json")
            self.before.append(len(json.loads(table.read_text())["rows"]) if table.is_file() else None)
            yield cell, record


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Compares with an engine that has these records, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mep_lightning.comparison.preflight.refuse_encoders", lambda *_: None)

    def run(engine, *words, methods="textual_inversion,lora"):
        monkeypatch.setattr("mep_lightning.commands.compare._engine", lambda *_: engine)
        return main(["compare", "--methods", methods, "--out", "told", *words])

    return run


GOOD = {"clip_t": 0.5, "clip_i": 0.5, "dino": 0.5, "dino_inter": None}


def test_the_table_is_there_as_cells_end(told, capsys):
    engine = Told(GOOD, GOOD, {"error": "told to stop", "kind": "stopped"})
    assert told(engine, "--subjects", "2") == 1, "what was asked for is not all there"
    assert engine.before == [None, 2, 2]
    assert len(Path("told/cells.jsonl").read_text().splitlines()) == 2, "who was stopped is gone on with"
    assert "textual_inversion on cube-0 #0: told to stop" in capsys.readouterr().out
    assert told(Told(GOOD, GOOD), "--subjects", "2") == 0
    assert "4 cells, 2 of them done" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_yet_ends_nothing(told, monkeypatch, capsys):
    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr("mep_lightning.comparison.report.write_table", fails)
    monkeypatch.setattr("mep_lightning.comparison.report.write_all", lambda *_: "written")
    assert told(Told(GOOD, GOOD), "--subjects", "1") == 0
    assert "The table could not be written yet (no room)." in capsys.readouterr().err


def test_whether_memory_is_looked_at_first_may_change(told, monkeypatch):
    assert told(Told(GOOD), "--subjects", "1", "--fit", "--samples.steps 1", methods="lora") == 0
    assert told(Told(), "--subjects", "1", "--fit", "--no-plan --samples.steps 1", methods="lora") == 0
    assert told(Told(), "--subjects", "1", "--fit", "--no-plan --samples.steps 2", methods="lora") == 2


def test_what_is_done_needs_no_packages(told, monkeypatch):
    assert told(Told(GOOD), "--subjects", "1", methods="qlora") == 0
    monkeypatch.setattr("mep_lightning.comparison.preflight.why_not_int4", lambda: "bitsandbytes is missing")
    assert told(Told(), "--subjects", "1", methods="qlora") == 0
    assert told(Told(), "--subjects", "2", methods="qlora") == 2


def test_sigterm_is_answered_as_ctrl_c_is(told, capsys):
    class Terminated(Told):
        def run_all(self, batches, logs):
            yield from super().run_all(batches, logs)
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # told again while cells are being saved

    before = signal.getsignal(signal.SIGTERM)
    assert told(Terminated(GOOD), "--subjects", "1") == 143
    assert "Carry on with the same command." in capsys.readouterr().err
    assert Path("told/table.md").is_file() and Path("told/report.html").is_file()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_recipe_that_was_changed_is_another_method(told, capsys):
    Path("mine.yaml").write_text(Path(recipe("lora")).read_text())
    assert told(Told(GOOD), "--subjects", "1", methods="mine.yaml") == 0
    Path("mine.yaml").write_text(re.sub(r"(?m)^  lr: .*$", "  lr: 0.5", Path("mine.yaml").read_text()))
    assert told(Told(GOOD), "--subjects", "1", methods="mine.yaml") == 2
    said = capsys.readouterr().err
    assert "--methods mine: the cells of it in told have model.lr 0.001, not 0.5: give another folder" in said


@pytest.fixture
def photos(tmp_path):
    for name in ("rex", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "prompts_and_classes.txt").write_text("rex,dog\n")
    return ["--data", "photos", "--base", "tiny"]


def test_what_subjects_are_is_told_and_a_damaged_photo_leaves_the_page(told, photos, capsys):
    (Path("photos/rex/0.png")).write_bytes(b"no picture")
    assert told(Told(GOOD, GOOD), *photos, methods="lora") == 0
    assert "Subjects: cat (cat), rex (dog)." in capsys.readouterr().out
    page = Path("told/report.html").read_text()
    assert page.count("data:image/png") == 3 and "rex" in page


def test_a_style_has_no_class_word(told, photos):
    class Lines(Told):
        def run_all(self, batches, logs):
            self.lines = [cell.fit for (cell,) in batches]
            yield from ()

    engine = Lines()
    told(engine, *photos, methods="zoodip,zoodip_style")
    assert ["--data.class_word" in line for line in engine.lines] == [True, False, True, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "--data.class_word 'my dog"], '--fit "--data.class_word \'my dog" cannot be read (No closing quot'),
        (["--fit", "--model.precisoin bf16"], "--model.precisoin"),
        (["--prompts", "wrong.txt"], "--prompts: 'a dog' lacks the subject"),
        (["--clip", "nowhere"], "nowhere"),
        (["--only", "rex,rex"], "--only rex: it is named twice"),
        (["--only", ","], "--only names none; choose from cat, rex"),
        (["--subjects", "3"], "--subjects 3: there are 2; give fewer"),
    ],
)
def test_a_mistake_that_every_cell_would_tell_leaves_nothing_behind(
    tmp_path, photos, words, message, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("wrong.txt").write_text("a {}\na dog\n")
    assert main(["compare", "--methods", "zoodip", "--out", "new", *photos, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ("--model.seed 5", "--fit sets --model.seed, which every cell has of its own: leave it out; say with --seeds"),
        ("--model.base=sd15", "leave it out; give it with --base"),
        ("--model '{seed: 5, precision: fp32}'", "--fit sets --model.seed"),
        ("--data.class_word toy", "write it into prompts_and_classes.txt"),
        ("--data='{path: elsewhere}' --model.lr 1", "--fit sets --data.path"),
        ("--trainer.max_steps 2 --run r", "--fit sets --run"),
        ("--resume", "leave it out; the same command again goes on with what is half trained"),
    ],
)
def test_what_makes_a_cell_a_cell_is_not_for_fit_to_set(fit, message):
    with pytest.raises(UserError, match=re.escape(message)):
        words_of_fit(fit)


def test_all_that_makes_a_cell_a_cell_has_a_mend():
    assert set(OWN_OF_A_CELL) < set(INSTEAD)
    words = ["--model.precision", "fp32", "--model", "{seed_of: 1, lr: [", "--data.resolution", "64", "--no-plan"]
    assert words_of_fit(shlex.join(words)) == words


def test_two_at_once_are_refused_before_either_has_said_what_it_compares(told, capsys):
    with ComparisonFolder(Path("told")).alone():
        assert told(Told(GOOD), "--subjects", "1") == 2
        assert [path.name for path in Path("told").iterdir()] == [".lock"]
    assert "--out told: another `mep compare` is at work there" in capsys.readouterr().err
    Path("told").mkdir()
    Path("told/.tmp-1-comparison.json").write_text('{"base"')  # and a kill while it says so is no claim
    assert told(Told(GOOD, GOOD), "--subjects", "1") == 0


def test_two_at_once_are_refused(told, capsys):
    assert told(Told(GOOD, GOOD), "--subjects", "1") == 0
    with ComparisonFolder(Path("told")).alone():
        assert told(Told(GOOD), "--subjects", "1") == 2
    assert "--out told: another `mep compare` is at work there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lora", "--subjects-per-batch", "0"], "--subjects-per-batch is 0; use 1 or more"),
        (["--methods", "lora", "--subjects-per-batch", "two"], "--subjects-per-batch: invalid int value: 'two'"),
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
