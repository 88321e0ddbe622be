"""The commands on a base in a single file."""

import json
import shutil
from pathlib import Path

import pytest

from mep_lightning.cli import main
from mep_lightning.tiny import CLIP, DINO

DRAWN = ["--steps", "1", "--device", "cpu"]


@pytest.fixture
def run(single_files, photo_folder, fit, tmp_path, monkeypatch):
    """A run that was begun beside the file, which it names by a relative path."""
    monkeypatch.chdir(single_files)
    words = ["--model.base", "sd15.safetensors", "--model.adapter.init_args.init", "ball", "--data.resolution", "32"]
    data = ["--data.path", photo_folder, "--data.class_word", "ball"]
    assert fit("--run", tmp_path / "run", *words, *data, steps=2) == 0
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_it_is_trained_resumed_drawn_and_scored_from_anywhere(run, single_files, config_of):
    base = str(single_files / "sd15.safetensors")
    assert config_of(run)["model"]["base"] == base
    assert main(["fit", "--run", str(run), "--resume", "--trainer.max_steps", "3"]) == 0
    shutil.copytree(run / "adapter", "export")
    assert main(["predict", "--run", "export", *DRAWN, "--prompts", "a {}", "--out", "drawn"]) == 0
    assert len(list(Path("drawn").glob("*.png"))) == 1
    Path("mine.txt").write_text("a {}\n")
    encoders = ["--clip", str(CLIP), "--dino", str(DINO)]
    scored = ["test", "--run", str(run), "--prompts", "mine.txt", "--images-per-prompt", "1", *encoders]
    assert main([*scored, "--steps", "1"]) == 0
    assert -1 <= json.loads((run / "metrics.json").read_text())["clip_t"] <= 1


def test_it_is_planned_for(single_files, capsys):
    words = ["--base", str(single_files / "sd15.safetensors"), "--methods", "zoodip", "--precision", "int8", "--json"]
    assert main(["plan", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows and all(row["peak_bytes"] > 0 for row in rows)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "zoodip", "--data.path", "photos", "--model.base"],
        ["plan", "--base"],
        ["compare", "--methods", "zoodip", "--data", ".", "--out", "out", "--base"],
        ["predict", "--run", "export", "--prompts", "a {}", "--base"],
    ],
)
def test_a_pickle_is_refused_by_every_command(said, trained, photo_folder, words):
    shutil.copytree(trained / "adapter", "export")
    Path("model.ckpt").write_bytes(b"")
    status, line = said([*words, "model.ckpt"])
    assert status == 2 and "model.ckpt' is pickled" in line
