"""`mep test`: pictures of the evaluation prompts and their scores."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mep_lightning import SubjectData
from mep_lightning.cli import main
from mep_lightning.commands.test import _as_trained_on, read_prompts


def test_test_scores_the_evaluation_prompts_of_the_base(trained, capsys):
    shutil.copytree(trained, "r")
    assert main(["test", "--run", "r", "--images-per-prompt", "1", "--steps", "1"]) == 0
    from mep_lightning.tiny import evaluation_prompts

    metrics = json.loads(Path("r/metrics.json").read_text())
    assert {"clip_t", "clip_i", "dino", "dino_inter"} <= set(metrics)
    assert all(-1 <= metrics[name] <= 1 for name in ("clip_t", "clip_i", "dino", "dino_inter"))
    assert metrics["settings"]["prompts"] == len(evaluation_prompts())
    assert len(list(Path("r/evaluation").glob("*.png"))) == len(evaluation_prompts())
    page = Path("r/report.html").read_text()
    for name in ("clip_t", "clip_i", "dino", "dino_inter"):
        assert f"{metrics[name]:.3f}" in page
    assert capsys.readouterr().out.splitlines()[-1] == "In r: evaluation, metrics.json, report.html."


def test_test_works_from_an_exported_folder_with_prompts_of_ones_own(trained, photo_folder, capsys):
    Path("export").mkdir()
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    Path("mine.txt").write_text("# two\na {} on grass\n\na photo of a {}\n")
    words = ["test", "--run", "export", "--base", "tiny", "--class-word", "ball", "--data", str(photo_folder)]
    assert main([*words, "--prompts", "mine.txt", "--images-per-prompt", "2", "--steps", "1"]) == 0
    metrics = json.loads(Path("export/metrics.json").read_text())
    assert metrics["settings"]["prompts"] == 2
    assert len(list(Path("export/evaluation").glob("*.png"))) == 4
    assert capsys.readouterr().out.splitlines()[-1] == "In export: evaluation, metrics.json."
    assert not Path("export/report.html").exists()


def test_a_second_test_leaves_no_picture_of_the_first(trained):
    shutil.copytree(trained, "r")
    Path("mine.txt").write_text("a {} on grass\n")
    words = ["test", "--run", "r", "--prompts", "mine.txt", "--steps", "1", "--images-per-prompt"]
    assert main([*words, "2"]) == main([*words, "1", "--seed", "7"]) == 0
    assert [path.name for path in Path("r/evaluation").iterdir()] == ["00-a-sks-ball-on-grass-seed7.png"]


@pytest.mark.parametrize(("crop", "size"), [("center", (90, 60)), ("letterbox", (90, 90))])
def test_photos_are_scored_as_they_were_trained_on(tmp_path, crop, size):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    data = SubjectData(str(tmp_path), class_word="ball", crop=crop)
    (photo,) = _as_trained_on(data)
    assert photo.size == size and photo.getpixel((45, size[1] // 2)) == (255, 0, 0)
    assert crop == "center" or photo.getpixel((45, 2)) == (255, 255, 255)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_are_read_as_any_editor_saves_them(encoding):
    Path("mine.txt").write_bytes("# mine\r\na {} by the sea\r\n\r\n{}, été\r\n".encode(encoding))
    assert read_prompts(Path("mine.txt")) == ["a {} by the sea", "{}, été"]
    Path("mine.txt").write_text("a {}\n", encoding=encoding)
    assert read_prompts(Path("mine.txt")) == ["a {}"]


@pytest.mark.parametrize("encoder", ["clip", "dino"])
def test_an_encoder_that_cannot_be_loaded_is_told_before_drawing(said, trained, encoder, monkeypatch):
    monkeypatch.setattr("mep_lightning.evaluation.generate", None)  # calling it would be a traceback
    Path("none").mkdir()
    status, sentence = said(["test", "--run", trained, f"--{encoder}", "none"])
    assert status == 2
    assert encoder.upper() in sentence and "none" in sentence
    assert not (trained / "evaluation").exists()


TEST_MISTAKES = {
    "no photos": (["--run", "EXPORT", "--base", "tiny"], "says where the photos are; add --data DIR."),
    "no such folder": (
        ["--run", "EXPORT", "--base", "tiny", "--class-word", "ball", "--data", "none"],
        "none does not exist: give --data a folder",
    ),
    "no prompts file": (["--run", "EXPORT", "--prompts", "none.txt"], "none.txt: cannot be read (No such file"),
    "no prompt": (["--run", "EXPORT", "--prompts", "empty.txt"], "empty.txt: holds no prompt"),
    "no subject": (["--run", "RUN", "--prompts", "dog.txt"], "--prompts: 'a dog' lacks the subject; put {} or <sks>"),
    "too many steps": (
        ["--run", "RUN", "--steps", "1001"],
        "--steps is 1001; use 1000, the base's timesteps, or less.",
    ),
    "number": (["--run", "EXPORT", "--images-per-prompt", "0"], "--images-per-prompt is 0; use 1 or more."),
}


@pytest.mark.parametrize("name", TEST_MISTAKES)
def test_a_mistake_in_test_is_answered_with_one_sentence(said, name, trained):
    Path("empty.txt").touch()
    Path("export").mkdir()
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    words, expected = TEST_MISTAKES[name]
    Path("dog.txt").write_text("a {}\na dog\n")
    status, sentence = said(["test", *({"EXPORT": "export", "RUN": trained}.get(word, word) for word in words)])
    assert status == 2
    assert expected in sentence
