"""`mep fit --budget`, and the plan that is compared with free memory before anything is loaded."""

import dataclasses

import pytest
import torch

from mep_lightning.bases import identify
from mep_lightning.cli import main
from mep_lightning.commands import budget
from mep_lightning.plan import budget as sizes

INT8 = ("--model.precision", "int8")


SHORT = ("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--trainer.max_steps", "1")


def test_the_plan_chooses_the_recipe_and_says_why(config_of, capsys):
    assert main(["fit", "--budget", "1GB", *INT8, *SHORT, "--trainer.accelerator", "cpu", "--run", "r"]) == 0
    model = config_of("r")["model"]
    assert (model["method"], model["precision"], model["checkpointing"]) == ("textual_inversion", "int8", False)
    assert "Into 1GB fits textual_inversion in int8: " in capsys.readouterr().out


def test_a_method_that_is_named_stays(config_of):
    assert main(["fit", "--config", "zoodip", "--budget", "1GB", *INT8, *SHORT, "--run", "r"]) == 0
    assert config_of("r")["model"]["method"] == "zoodip"


def test_nothing_fits(said):
    status, sentence = said(["fit", "--budget", "1MB", *INT8])
    assert status == 2
    assert sentence.startswith("mep fit: --budget 1MB: the least, ")
    assert sentence.endswith("; give more, or a lower --data.resolution.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "lots"], "mep fit: --budget is 'lots'; give a size such as 4GB or 3.5GiB."),
        (["--budget", "1GB", "--run", "r", "--resume"], "mep fit: --budget chooses how a run begins; leave it out"),
    ],
)
def test_mistakes(said, words, sentence):
    status, told = said(["fit", *words])
    assert status == 2 and told.startswith(sentence)


@pytest.fixture
def crowded(monkeypatch):
    """Ten megabytes are free, and the base is not known to be tiny."""
    monkeypatch.setattr(budget, "identify", lambda name: dataclasses.replace(identify(name), family="sd1"))
    monkeypatch.setattr(budget, "free_bytes", lambda device: 10_000_000)


@pytest.mark.usefixtures("crowded")
def test_a_run_that_would_not_fit_is_refused_before_anything_is_loaded(said, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "available_precisions", lambda: ["int8"])
    monkeypatch.setattr("mep_lightning.module.load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    status, sentence = said(["fit", "--config", "zoodip", *quick, "--run", "r"])
    assert status == 2
    assert sentence.startswith("mep fit: this run would take ")
    assert "and 9.54 MiB are free on cpu: the least, " in sentence
    assert sentence.endswith("; --no-plan tries it all the same.")
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("crowded")
def test_the_plan_can_be_overruled(fit):
    assert fit("--no-plan", "--run", "r", steps=1) == 0


def test_a_container_leaves_no_more_than_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "CGROUP", tmp_path)
    unlimited = sizes.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert sizes.free_bytes(torch.device("cpu")) == 3000 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert sizes.free_bytes(torch.device("cpu")) > 3000
