"""`mep predict`: pictures of the learned subject."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageColor
from safetensors.torch import save_file

from mep_lightning.cli import main
from mep_lightning.commands.drawing import Drawn
from mep_lightning.commands.learned import open_learned


def test_predict_draws_the_same_picture_for_the_same_seed(trained, capsys):
    words = [
        "predict",
        "--run",
        str(trained),
        "--steps",
        "2",
        "--count",
        "2",
        "--prompts",
        "a <sks> ball",
        "a {} on grass",
    ]
    assert main([*words, "--out", "a"]) == main([*words, "--out", "b"]) == 0
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == [
        "00-a-sks-ball-seed0.png",
        "00-a-sks-ball-seed1.png",
        "01-a-sks-ball-on-grass-seed0.png",
        "01-a-sks-ball-on-grass-seed1.png",
    ]
    assert all(Path("a", name).read_bytes() == Path("b", name).read_bytes() for name in names)
    picture = Image.open(Path("a", names[2]))
    assert picture.size == (64, 64)
    assert picture.text["prompt"] == "a <sks> ball on grass"
    assert Path("a", names[0]).read_bytes() != Path("a", names[1]).read_bytes()


def saved(prompt, color="red", seed=0, **how):
    """The name under which one picture is kept in the folder `out`."""
    drawn = Drawn([Image.new("RGB", (8, 8), color)], [prompt], [seed], how)
    (path,) = drawn.save(Path("out"))
    assert Image.open(path).text["prompt"] == prompt and Image.open(path).getpixel((0, 0)) == ImageColor.getrgb(color)
    return path.name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A <sks> Ball_2, on grass!", "00-a-sks-ball-2-on-grass-seed0.png"),
        ("一只 <sks> 球在雪地里", "00-一只-sks-球在雪地里-seed0.png"),
        ("ein <sks> Ball im Süden", "00-ein-sks-ball-im-süden-seed0.png"),
        ("ein <sks> Ball im Su\u0308den", "00-ein-sks-ball-im-süden-seed0.png"),
        ("a" * 300, f"00-{'a' * 60}-seed0.png"),
        ("球" * 300, f"00-{'球' * 20}-seed0.png"),
        ("a" + "球" * 300, f"00-a{'球' * 19}-seed0.png"),
        ("⚽", "00--seed0.png"),
    ],
)
def test_pictures_are_named_after_prompt_and_seed_in_any_script(prompt, name):
    assert saved(prompt) == name


def test_a_picture_takes_the_place_of_no_other():
    first, second = saved("⚽", guidance=3.0), saved("🏀", guidance=3.0)
    assert (first, second) == ("00--seed0.png", "00--seed0-2.png")
    before = Path("out", first).read_bytes()
    assert saved("⚽", guidance=5.0) == "00--seed0-3.png"  # other settings
    assert saved("⚽", "blue", guidance=3.0) == "00--seed0-4.png"  # another picture, as of another strength
    assert saved("⚽", guidance=3.0) == first and saved("🏀", guidance=3.0) == second  # drawn again
    assert saved("⚽", seed=1) == "00--seed1.png"
    assert Path("out", first).read_bytes() == before and len(list(Path("out").iterdir())) == 5


def test_a_run_draws_with_the_activations_that_it_was_trained_with(fit, config_of, monkeypatch):
    words = ("--model.activations", "bf16", "--run", "r")
    noted = []
    monkeypatch.setattr("mep_lightning.advice.rank_zero_warn", noted.append)
    assert fit(*words, "--model.estimator.init_args.mu", "1e-3", steps=1) == 0
    assert any(
        re.search("mu 0.001 drowns .* take mu 0.03, activations fp32, or ForwardGradientEstimator", note)
        for note in noted
    )
    assert open_learned("r").load().dtype == torch.bfloat16
    assert open_learned("r", precision="fp32").load().dtype == torch.float32
    assert fit(*words[:2], "--run", "s", steps=1) == 0
    assert config_of("s")["model"]["estimator"]["init_args"]["mu"] == 0.03


def test_an_exported_folder_draws_what_the_run_draws(trained):
    Path("export").mkdir()
    Path("export/token.txt").write_text("notes of mine")
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    words = ["--steps", "2", "--prompts", "a photo of {}"]
    assert main(["predict", "--run", str(trained), *words, "--out", "a"]) == 0
    assert main(["predict", "--run", "export", *words, "--out", "b"]) == 0  # the file says base, precision, class word
    assert main(["predict", "--run", "export", *words, "--class-word", "cube", "--out", "c"]) == 0
    a, b, c = (next(Path(folder).iterdir()) for folder in "abc")
    assert "ball" in a.name
    assert a.read_bytes() == b.read_bytes()
    assert "cube" in c.name


def test_a_run_killed_before_its_export_draws_from_its_checkpoint(trained):
    shutil.copytree(trained, "r")
    shutil.rmtree("r/adapter")
    words = ["--steps", "2", "--prompts", "a <sks> ball"]
    assert main(["predict", "--run", str(trained), *words, "--out", "a"]) == 0
    assert main(["predict", "--run", "r", *words, "--out", "b"]) == 0
    pictures = [Image.open(next(Path(folder).iterdir())).tobytes() for folder in ("a", "b")]
    assert pictures[0] == pictures[1]


PREDICT_MISTAKES = {
    "no prompt": (["--run", "RUN"], "--prompts is missing"),
    "no run": (["--prompts", "x"], "--run is missing"),
    "no such run": (["--run", "none", "--prompts", "x"], "none does not exist"),
    "nothing learned": (["--run", ".", "--base", "tiny", "--prompts", "x"], "holds none of learned_embeds.safetensors"),
    "no base": (["--run", "foreign", "--prompts", "x"], "no config.yaml says its base; add --base tiny"),
    "unknown token": (["--run", "RUN", "--prompts", "a <sk> ball"], "names <sk>, which"),
    "empty prompt": (["--run", "RUN", "--prompts", "a {}", " "], '--prompts is ""; use a text each'),
    "device": (["--run", "RUN", "--prompts", "x", "--device", "warp"], "--device warp: not on this machine"),
    "seed": (["--run", "RUN", "--prompts", "x", "--seed", "-1"], "--seed is -1; use 0 to 9223372036854775807."),
    "count": (["--run", "RUN", "--prompts", "x", "--count", "0"], "--count is 0; use 1 or more."),
    "steps": (["--run", "RUN", "--prompts", "x", "--steps", "0"], "--steps is 0; use 1 or more."),
    "huge seed": (["--run", "RUN", "--prompts", "x", "--seed", str(2**63)], "--seed is 9223372036854775808; use 0 to"),
    "too many steps": (
        ["--run", "RUN", "--prompts", "x", "--steps", "5000"],
        "--steps is 5000; use 1000, the base's timesteps, or less.",
    ),
    "guidance": (["--run", "RUN", "--prompts", "x", "--guidance", "nan"], "--guidance is nan; use a number."),
    "a file for a folder": (["--run", "RUN", "--prompts", "x", "--out", "a.txt"], "a.txt cannot be used (File exists)"),
    "not a number": (["--run", "RUN", "--prompts", "x", "--seed", "a"], "--seed: invalid int value: 'a'"),
    "option": (["--run", "RUN", "--prompts", "x", "--stepz", "1"], "no option --stepz; did you mean --steps?"),
}


@pytest.mark.parametrize("name", PREDICT_MISTAKES)
def test_a_mistake_in_predict_is_answered_with_one_sentence(said, name, trained):
    Path("a.txt").touch()
    Path("foreign").mkdir()
    save_file({"<sks>": torch.zeros(1, 128)}, "foreign/learned_embeds.safetensors")  # another program's, or an old one
    words, expected = PREDICT_MISTAKES[name]
    words = [{"RUN": trained}.get(word, word) for word in words]
    status, sentence = said(["predict", *words])
    assert status == 2
    assert expected in sentence


def test_a_settings_file_cannot_make_predict_call_what_it_names(said, trained):
    shutil.copytree(trained, "shared")
    settings = yaml.safe_load(Path("shared/config.yaml").read_text())
    settings["model"]["adapter"] = {"class_path": "os.system", "init_args": {"command": "touch called"}}
    Path("shared/config.yaml").write_text(yaml.safe_dump(settings))
    status, sentence = said(["predict", "--run", "shared", "--prompts", "a <sks> ball"])
    assert status == 2 and "model.adapter is none of TokenEmbedding" in sentence
    assert not Path("called").exists()


def test_an_output_folder_that_cannot_be_is_refused_before_drawing(said, trained, monkeypatch):
    Path("a.txt").touch()
    monkeypatch.setattr("mep_lightning.evaluation.generate", None)  # calling it would be a traceback
    status, sentence = said(["predict", "--run", trained, "--prompts", "x", "--out", "a.txt/pictures"])
    assert (status, sentence) == (2, "mep predict: a.txt/pictures cannot be used (Not a directory); give another path.")


def test_pictures_of_a_runs_adapter_folder_go_to_the_run(trained, capsys):
    shutil.copytree(trained, "r")
    Path("r/adapter/config.txt").touch()
    assert main(["predict", "--run", "r/adapter", "--steps", "1", "--prompts", "a {}"]) == 0
    assert [path.name for path in Path("r/predictions").iterdir()] == ["00-a-sks-ball-seed0.png"]
    assert not Path("r/adapter/predictions").exists()


@pytest.mark.parametrize(
    ("prompt", "noted"), [("a <sks>, wet", False), ("<sks>'s hat", False), ("a {}", False), ("a ball", True)]
)
def test_a_prompt_without_the_subject_is_noted(trained, prompt, noted, capsys):
    assert main(["predict", "--run", str(trained), "--steps", "1", "--out", "a", "--prompts", prompt]) == 0
    assert ("Note: the subject is not in" in capsys.readouterr().out) is noted


def test_braces_that_stand_for_nothing_are_noted(trained, capsys):
    words = ["--steps", "1", "--out", "a", "--prompts", "a {} {foo}"]
    assert main(["predict", "--run", str(trained), *words]) == 0
    assert "Note: {foo} stands for nothing and is drawn as it is" in capsys.readouterr().out


DAMAGES = {
    "model: 3": "model is 3, not settings",
    "data: []": "data is [], not settings",
    "model: {base: [1]}": "model.base is [1], not text",
    "model: {base: tiny, precision: 7}": "model.precision is 7, not text",
    "model: {base: tiny, precision: int3}": "model.precision is 'int3'",
    "model: {base: tiny, method: {}}": "model.method is {}, not text",
    "model: {base: tiny, adapter: 3}": "model.adapter is none of TokenEmbedding",
    "data: {path: 3}": "data.path is 3, not text",
    "data: {class_word: [a]}": "data.class_word is ['a'], not text",
}


@pytest.mark.parametrize("command", [["predict", "--prompts", "a {}"], ["test"]], ids=lambda words: words[0])
@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_settings_file_is_named_with_its_key(said, trained, text, command):
    shutil.copytree(trained, "r")
    Path("r/config.yaml").write_text(text)
    status, sentence = said([*command, "--run", "r"])
    assert status == 2
    assert f"r/config.yaml: {DAMAGES[text]}" in sentence
