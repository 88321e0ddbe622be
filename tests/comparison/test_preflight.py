"""What is looked at before hours of cells."""

import pytest
import torch

from mep_lightning.comparison.cells import Cell
from mep_lightning.comparison.preflight import Method, gpus_of, read_method, refuse_encoders, visible_gpus
from mep_lightning.errors import UserError


def read(tmp_path, method, *words, prompts=None, is_here=True):
    line = ["--config", method, "--run", str(tmp_path / "run"), "--model.base", "tiny", "--model.seed", "3"]
    line += ["--data.path", str(tmp_path), "--data.class_word", "ball", *words]
    return read_method(Cell(method, "x", 3, tmp_path / "run", line, []), "ball", prompts, is_here)


def test_what_a_method_is_trained_with_is_all_that_decides_what_is_learned(tmp_path):
    settings = read(tmp_path, "zoodip_fast").settings
    assert settings["model.lr"] == 1e-2 and settings["model.estimator.n"] == 8 and settings["trainer.max_steps"] == 1500
    assert settings["trainer.callbacks"] and settings["data.resolution"] == 64
    assert not {"model.seed", "data.path", "model.members_at_once", "model.offload"} & settings.keys()
    assert read(tmp_path, "zoodip_fast", "--model.seed", "4", "--data.class_word", "cat").settings == settings
    other = read(tmp_path, "zoodip_fast", "--trainer.callbacks.init_args.high", "600").settings
    assert {key for key in settings if settings[key] != other[key]} == {"trainer.callbacks"}


def test_a_style_is_told_from_an_object(tmp_path):
    assert [read(tmp_path, name).is_style for name in ("zoodip", "zoodip_style")] == [False, True]


def test_a_budget_chooses_later(tmp_path):
    assert read(tmp_path, "lora", "--budget", "4GB") is None


@pytest.mark.parametrize(
    ("words", "prompts", "said"),
    [
        (["--model.precisoin", "bf16"], None, "--model.precisoin"),
        (["--model.lr", "-1"], None, "model.lr is -1.0; use a number above 0"),
        ([], ["a photo of a {}", "a dog"], "--prompts: 'a dog' lacks the subject; put {} or <sks> where it goes"),
        ([], ["a photo of a <cat> {}"], "names <cat>, which .*run has not learned"),
    ],
)
def test_a_mistake_is_told(tmp_path, words, prompts, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, "zoodip", *words, prompts=prompts)


def test_packages_and_devices_are_those_of_who_runs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mep_lightning.comparison.preflight.why_not_int4", lambda: "bitsandbytes is missing")
    with pytest.raises(UserError, match="--methods qlora takes the base in int4: bitsandbytes is missing"):
        read(tmp_path, "qlora")
    assert read(tmp_path, "qlora", is_here=False).settings["model.precision"] == "int4"
    words = ["--trainer.accelerator", "gpu", "--trainer.devices", "8"]
    assert read(tmp_path, "zoodip", *words, is_here=False).devices == "8"
    with pytest.raises(UserError, match="model.precisoin"):
        read(tmp_path, "zoodip", "--model.precisoin", "bf16", is_here=False)
    read(tmp_path, "lora", prompts=["a {}", "a sks dog"], is_here=False)
    with pytest.raises(UserError, match="'a dog' lacks the subject"):
        read(tmp_path, "zoodip", prompts=["a dog"], is_here=False)


def test_encoders_are_opened(tmp_path):
    refuse_encoders(None, None, "tiny")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none"):
        refuse_encoders(str(tmp_path / "none"), None, "tiny")


@pytest.mark.parametrize(
    ("said", "count", "found"),
    [(None, 3, ["0", "1", "2"]), ("5, 7", 2, ["5", "7"]), ("GPU-a", 1, []), (None, 0, []), (None, 1, [])],
)
def test_gpus_by_the_names_that_cuda_knows(monkeypatch, said, count, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus() == found
    alone, several = Method({}, False, 1), Method({}, False, 2)
    assert gpus_of({"a": alone}, 4) == found
    assert gpus_of({"a": alone}, 1) == gpus_of({"a": alone, "b": several}, 4) == gpus_of({"a": None}, 4) == []
