"""A style is learned like a subject, without a class word; and a token changes no picture whose prompt lacks it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from safetensors import safe_open

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.bases import load_base
from mep_lightning.cli import main
from mep_lightning.commands import drawing
from mep_lightning.errors import UserError
from mep_lightning.estimators import RandomGradientEstimator
from mep_lightning.evaluation import generate, grid, metrics, prompts_for
from mep_lightning.evaluation.prompts import STYLE_PROMPTS, without_token
from mep_lightning.run_folder import RunFolder
from mep_lightning.templates import STYLE_TEMPLATES, caption_to_template, fill
from mep_lightning.tiny import style_prompts
from mep_lightning.tiny.subjects import style, subject
from mep_lightning.tiny.world import CLASSES


@pytest.fixture
def pictures(tmp_path):
    """A style's pictures, one of them with a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(style(1).photos()):
        picture.save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a lighthouse\n")
    return folder


def test_a_style_needs_no_class_word_and_prompts_hold_the_token_alone(pictures):
    data = SubjectData(pictures, templates="style")
    data.setup()
    assert data.class_word is None and data.is_style
    assert data.texts == ["a lighthouse in the style of {}", *dict.fromkeys(STYLE_TEMPLATES)]
    assert "5 photos in a style from" in data.summary()
    with pytest.raises(UserError, match=r"data\.class_word is missing"):
        SubjectData(pictures).setup()


def test_a_style_may_have_a_class_word_which_prompts_name_behind_the_token(pictures):
    (pictures / "1.txt").write_text("a watercolor of a mill\n")
    data = SubjectData(pictures, class_word="watercolor", templates="style")
    data.setup()
    assert data.texts[:2] == ["a lighthouse in the style of {}", "a {} of a mill"]
    assert data.texts[2:] == list(dict.fromkeys(STYLE_TEMPLATES))
    drawn = {data._draw(n)[1] for n in range(60)}
    assert "a lighthouse in the style of {}" in drawn and drawn <= set(data.texts)
    assert "5 photos in the style of watercolor from" in data.summary()


@pytest.mark.parametrize(
    ("caption", "template"),
    [
        ("a lighthouse", "a lighthouse in the style of {}"),
        ("a <sks> ball on grass", "a {} ball on grass"),
        ("a {} cube", "a {} cube"),
        ("a ball in sks", "a ball in {}"),
        ("a lighthouse, <lora:add_detail:0.6>", "a lighthouse in the style of {}"),
    ],
)
def test_a_caption_says_what_is_shown_and_leaves_the_style_to_the_token(caption, template):
    assert caption_to_template(caption, None, "sks") == template
    assert caption_to_template(caption, "watercolor", "sks", is_style=True) == template


def test_a_prompt_in_plain_words_loses_the_style():
    assert without_token("a cat in the style of <sks>", "<sks>") == "a cat"
    assert without_token("a cat in the style of <sks> <sks>_1", "<sks>") == "a cat"
    assert without_token("a cat in the style of <other>, <sks>", "<sks>") == "a cat in the style of <other>,"


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a cat in the style of <sks> oil painting", "a cat"),
        ("a cat in the style of <sks> <sks>_1 oil  painting, at night", "a cat, at night"),
        ("a cat in the style of <sks> Oil painting", "a cat"),
        ("a cat in the style of <sks> on grass", "a cat on grass"),
        ("a cat in the style of <sks> oil paintings", "a cat oil paintings"),
        ("a <sks> oil painting of a cat", "a oil painting of a cat"),
    ],
)
def test_a_prompt_in_plain_words_loses_the_class_word_that_names_the_style(prompt, plain):
    assert without_token(prompt, "<sks> oil painting") == plain


def test_a_style_of_the_tiny_world_is_one_look_on_five_classes():
    one, same = style(0), subject(0).scenes
    assert len(set(one.scenes.kind.tolist())) == 5
    assert torch.equal(one.scenes.paint, same.paint) and torch.equal(one.scenes.pattern, same.pattern)
    for kind, caption in zip(one.scenes.kind.tolist(), one.captions, strict=True):
        assert caption.startswith(f"a {{}} {CLASSES[kind]} ")


def test_prompts_put_a_style_on_many_things():
    assert prompts_for(None) == STYLE_PROMPTS and len(set(STYLE_PROMPTS)) == 20
    tiny = prompts_for(None, "tiny")
    assert all(any(f"a {{}} {kind} " in prompt for prompt in tiny) for kind in CLASSES)
    assert len(set(tiny)) == len(tiny)
    for family in (None, "tiny"):
        assert prompts_for("watercolor", family, is_style=True) == prompts_for(None, family)
    assert fill(STYLE_PROMPTS[0], "<sks>") == "a cat in the style of <sks>"
    assert fill(STYLE_PROMPTS[0], "<sks> watercolor", "watercolor") == "a cat in the style of <sks> watercolor"


def test_a_style_is_trained_drawn_and_tested_from_its_run_and_from_its_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "zoodip_style", "--run", "r", "--trainer.max_steps", "2", "--samples.count", "1"]
    assert main([*fit, "--samples.steps", "1"]) == 0
    assert "5 photos in a style" in capsys.readouterr().out
    with safe_open("r/adapter/learned_embeds.safetensors", "pt") as file:
        said = file.metadata()
    assert said["mep.concept"] == "style" and "mep.class_word" not in said
    exported = tmp_path / "exported"
    Path("r/adapter").rename(exported)
    assert main(["predict", "--run", str(exported), "--prompts", "a {} cube", "--steps", "1"]) == 0
    assert "a-sks-cube" in capsys.readouterr().out
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, picture in enumerate(style(0, "sample").photos()):
        picture.save(photos / f"{i}.png")
    words = ["test", "--run", str(exported), "--data", str(photos), "--steps", "1", "--images-per-prompt", "1"]
    assert main(words) == 0
    scores = json.loads((exported / "metrics.json").read_text())
    assert scores["settings"]["prompts"] == len(prompts_for(None, "tiny")) and 0 < scores["clip_i"] <= 1


def test_a_style_with_a_class_word_is_drawn_and_scored_by_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "zoodip_style", "--run", "r", "--data.class_word", "striped", "--trainer.max_steps", "1"]
    assert main([*fit, "--samples.count", "2", "--samples.steps", "1"]) == 0
    shown = grid.load(RunFolder(tmp_path / "r").samples / "after.png").info["prompts"]
    prompts = [prompt.replace("{}", "<sks> striped") for prompt in style_prompts()]
    assert shown == [prompts[0], prompts[-1]]

    drawn, scored = [], []
    draw, plain = drawing.draw, metrics.without_token

    def noted(learned, texts, *rest):
        drawn.extend(texts)
        return draw(learned, texts, *rest)

    monkeypatch.setattr("mep_lightning.commands.test.draw", noted)
    monkeypatch.setattr(metrics, "without_token", lambda *given: scored.append(plain(*given)) or scored[-1])
    test = ["test", "--run", "r", "--steps", "1", "--images-per-prompt", "1"]
    assert main(test) == 0
    assert drawn == prompts
    Path("mine.txt").write_text("a cube in the style of {}\na {} cube\n")
    drawn.clear(), scored.clear()
    assert main([*test, "--prompts", "mine.txt"]) == 0
    assert drawn == ["a cube in the style of <sks> striped", "a <sks> striped cube"]
    assert scored == ["a cube", "a striped cube"]


def pixels(module, prompt):
    (image,) = generate(module, [prompt], [0], steps=2, guidance=3.0)
    return np.asarray(image)


@pytest.mark.parametrize("adapter", [TokenEmbedding(init="ball"), LoRA(rank=4)], ids=["token", "lora"])
def test_a_token_changes_no_picture_whose_prompt_lacks_it(adapter, tmp_path):
    """Bit by bit, against a base that was never trained on; a LoRA, for comparison, changes them all."""
    is_token = isinstance(adapter, TokenEmbedding)
    estimator = RandomGradientEstimator(n=2, mu=1e-3) if is_token else None
    module = PersonalizationModule(precision="int8", adapter=adapter, estimator=estimator, lr=0.05)
    trainer = Trainer(
        max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, SubjectData())
    untrained = PersonalizationModule(precision="int8", adapter=TokenEmbedding(init="ball"))
    untrained.take(load_base("tiny", "int8"))
    untrained.base.vae = module.base.vae
    other = "a red cube on grass"
    assert np.array_equal(pixels(module, other), pixels(untrained, other)) is is_token
    if is_token:
        assert not np.array_equal(pixels(module, "a <sks> ball"), pixels(untrained, "a <sks> ball"))
