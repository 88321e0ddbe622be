"""The methods that the papers compare with, from the command line: trained, resumed, and drawn with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mep_lightning.cli import main

SHORT = ["--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--checkpoint.every", "2"]
LOUD = {
    "qlora": ["--model.adapter.rank", "4", "--model.lr", "1e-2"],
    "peqa": ["--model.lr", "1e-4"],
    "tuneqdm": ["--model.lr", "1e-4"],
    "gf_ti": ["--model.estimator.population", "4", "--model.estimator.sigma", "3.0"],
}
"""Enough to be seen in a picture after four steps."""
SUBJECT = {"gf_ti": "<sks>"}
EXPORTS = {
    "qlora": "pytorch_lora_weights.safetensors",
    "peqa": "scales.safetensors",
    "tuneqdm": "scales.safetensors",
    "gf_ti": "learned_embeds.safetensors",
}
METHODS = pytest.mark.parametrize("method", LOUD)


def fit(method, run, steps, *words):
    return main(
        ["fit", "--config", method, *SHORT, *LOUD[method], "--trainer.max_steps", str(steps), "--run", run, *words]
    )


def drawn(run, out, word):
    words = ["--steps", "3", "--prompts", f"a photo of a {word} ball"]
    assert main(["predict", "--run", str(run), "--out", out, *words]) == 0
    (path,) = Path(out).glob("*.png")
    return np.asarray(Image.open(path), dtype=float)


@METHODS
def test_what_is_trained_is_drawn_from_the_run_and_from_its_export(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(method, "r", 4) == 0
    word = SUBJECT.get(method, "sks")
    assert (Path("r/adapter") / EXPORTS[method]).is_file()
    learned, again = drawn("r", "one", word), drawn("r/adapter", "two", word)
    assert np.abs(learned - again).max() <= 2
    start = np.asarray(Image.open("r/samples/before.png"), dtype=float)
    assert start.shape[2] == 3 and not np.array_equal(start, np.asarray(Image.open("r/samples/after.png"), dtype=float))


@pytest.mark.slow
@METHODS
def test_a_stopped_run_carries_on_bitwise(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(method, "whole", 4) == fit(method, "half", 2) == 0
    assert main(["fit", "--run", "half", "--resume", "--trainer.max_steps", "4"]) == 0
    whole, half = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "half")
    )
    assert whole.keys() == half.keys() and all(torch.equal(whole[key], half[key]) for key in whole)


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("peqa", ["--model.precision", "fp32"], "QuantizationScales are those of int8 weights, and these are fp32"),
        ("tuneqdm", ["--model.precision", "int4"], "QuantizationScales are those of int8 weights, and these are int4"),
        ("gf_ti", ["--model.estimator.population", "2"], "CMAES.population is 2; use 4 or more"),
        ("qlora", ["--model.adapter.targets", "[to_x]"], "LoRA.targets: 'to_x' is the name of no layer there"),
    ],
)
def test_a_wrong_setting_is_one_sentence(method, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit(method, "r", 2, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in lines[-1] and len(lines) <= 2
    assert not Path("r").exists()
