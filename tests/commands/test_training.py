"""A run's folder belongs to one `mep fit` at a time; who comes second changes nothing there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mep_lightning.cli import main
from mep_lightning.commands import together, training
from mep_lightning.commands.fit import requested
from mep_lightning.commands.training import FitCLI, alone
from mep_lightning.errors import UserError
from mep_lightning.run_folder import LOCK, RunFolder, held

ROOT = Path(__file__).parents[2]
TAKEN = "another `mep fit` trains in r: wait until it is done, or give another --run."


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_who_comes_second_is_refused_in_a_sentence_and_leaves_all_as_it_was(said, quick):
    words = ["fit", "--config", "zoodip", *quick, "--trainer.max_steps", "1", "--run", "r"]
    with held(Path("r"), ""):
        assert said(words) == (2, f"mep fit: {TAKEN}")
        assert files("r") == [LOCK]


def test_a_run_that_goes_on_meanwhile_is_not_resumed_and_keeps_what_it_is_writing(said, fit):
    assert fit("--run", "r", steps=1) == 0
    Path("r/checkpoints/.tmp-1-last.ckpt").write_text("half")
    before = files("r")
    assert LOCK not in before
    with held(Path("r"), ""):
        assert said(["fit", "--run", "r", "--resume", "--trainer.max_steps", "2"]) == (2, f"mep fit: {TAKEN}")
        assert files("r") == [LOCK, *before]
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "2"]) == 0
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert LOCK not in files("r") and not list(Path("r").rglob(".tmp-*"))


def test_one_that_is_refused_leaves_the_run_that_began_there_since(said, fit, monkeypatch):
    """Both saw an empty folder; the other has kept its settings by the time that this one's are found wrong."""
    make = FitCLI.__init__

    def make_later(self, request):
        Path("r").mkdir()
        Path("r/config.yaml").write_text("model: {}")
        make(self, request)

    monkeypatch.setattr(FitCLI, "__init__", make_later)
    status, sentence = said(["fit", "--config", "zoodip", "--model.lr", "-1", "--run", "r"])
    assert status == 2 and "model.lr is -1.0" in sentence
    assert files("r") == ["config.yaml"]


def test_a_run_that_came_to_its_end_since_is_not_written_over(said, quick, monkeypatch):
    make = FitCLI.__init__

    def make_later(self, request):
        make(self, request)
        Path("r").mkdir()
        Path("r/config.yaml").write_text("model: {}")

    monkeypatch.setattr(FitCLI, "__init__", make_later)
    status, sentence = said(["fit", "--config", "zoodip", *quick, "--trainer.max_steps", "1", "--run", "r"])
    assert status == 2
    assert sentence == "mep fit: r exists and is not empty; add --resume to carry it on, or name another folder."
    assert files("r") == ["config.yaml"]


def test_a_refused_run_leaves_no_folder_named_or_not(said, quick, monkeypatch):
    def refuse(*_, **__):
        raise UserError("it is too large")

    monkeypatch.setattr(training, "refuse_too_large", refuse)
    for words in ([], ["--run", "r"]):
        assert said(["fit", "--config", "zoodip", *quick, *words]) == (2, "mep fit: it is too large")
    assert said(["fit", "--config", "zoodip", "--model.lr", "-1"])[0] == 2
    assert files(".") == ["runs"]


def test_of_several_processes_of_a_run_the_first_holds_its_folder(monkeypatch):
    request, _ = requested(["--config", "zoodip", "--run", "r"])
    with alone(request):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with alone(request) as run:
            assert run == RunFolder(Path("r"))
        assert files("r") == [LOCK]
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(UserError, match="another `mep fit` trains in r"), alone(request):
            pass


def test_runs_that_train_in_one_batch_each_have_their_folder_alone(quick, photo_folder):
    line = ["--config", "textual_inversion", "--data.path", str(photo_folder), "--data.class_word", "ball"]
    lines = [[*line, "--model.base", "tiny", "--trainer.max_steps", "1", "--run", name] for name in ("a", "r")]
    with held(Path("r"), ""):
        with pytest.raises(UserError, match="another `mep fit` trains in r"):
            together.train(lines)
        assert files("r") == [LOCK] and not Path("a").exists()


def test_ctrl_c_while_loading_leaves_a_run_that_an_earlier_command_began(fit, monkeypatch, capsys):
    from mep_lightning import PersonalizationModule

    def interrupted(self, *_):
        raise KeyboardInterrupt

    assert fit("--run", "r", steps=1) == 0
    Path("r/checkpoints/last.ckpt").unlink()  # as if it had been killed before the first
    before = files("r")
    monkeypatch.setattr(PersonalizationModule, "load", interrupted)
    assert main(["fit", "--run", "r", "--resume"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "mep fit: stopped before the first step; what there was is kept. Begin again with: mep fit --run r --resume"
    )
    assert files("r") == before and "config.yaml" in before


@pytest.mark.slow
def test_of_two_that_are_started_at_once_one_trains(quick):
    words = ["fit", "--config", "zoodip", *quick, "--trainer.max_steps", "10", "--run", "r"]
    command = [sys.executable, "-m", "mep_lightning.cli", *words]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams) for _ in range(2)]
    told = sorted((process.communicate(timeout=300)[1], process.returncode)[::-1] for process in both)
    assert [status for status, _ in told] == [0, 2]
    assert "mep fit: another `mep fit` trains in r" in told[1][1] or "mep fit: r exists and is not empty" in told[1][1]
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 10
