"""LoRAs from the command line: trained, resumed, drawn with at a strength, merged, and along a hollow's paths."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mep_lightning.callbacks.hollowed import HollowedActivations
from mep_lightning.cli import main
from mep_lightning.commands import budget
from mep_lightning.hollow import Hollow

SHORT = [
    *("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--checkpoint.every", "2"),
    *("--model.adapter.init_args.rank", "4", "--model.lr", "1e-2"),
]
HOLLOW = ["--trainer.callbacks.samples", "4"]


def fit(run, *words, config="lora", steps=4):
    return main(["fit", "--config", config, *SHORT, "--trainer.max_steps", str(steps), "--run", str(run), *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A LoRA and a hollowed one, to be left as they are."""
    folder = tmp_path_factory.mktemp("loras")
    assert fit(folder / "lora") == 0
    assert fit(folder / "hollowed", *HOLLOW, config="hollowed_net") == 0
    return folder


def drawn(run, *words):
    """The picture of one prompt and seed."""
    out = f"out{len(list(Path().glob('out*')))}"
    words = ["--steps", "3", "--prompts", "a photo of a sks ball", *words]
    assert main(["predict", "--run", str(run), "--out", out, *words]) == 0
    (path,) = Path(out).glob("*.png")
    return np.asarray(Image.open(path), dtype=float)


def near(one, other):
    return abs(one - other).max() <= 2


@pytest.mark.slow
def test_strength_and_merging(runs):
    whole, half, none, merged = (
        drawn(runs / "lora", *words) for words in ([], ["--lora-scale", "0.5"], ["--lora-scale", "0"], ["--merge"])
    )
    assert near(whole, merged) and near(drawn(runs / "lora" / "adapter"), whole)
    assert not near(whole, half) and not near(half, none)
    assert near(drawn(runs / "lora", "--merge", "--lora-scale", "0.5"), half)
    assert not near(whole, none)


def test_merging_into_packed_weights_rounds_once(runs):
    apart, merged = (drawn(runs / "lora", "--precision", "int8", *words) for words in ([], ["--merge"]))
    assert abs(apart - merged).mean() < 8


def test_a_hollowed_lora_draws_along_two_paths_or_one(runs):
    two, one, merged = (drawn(runs / "hollowed", *words) for words in ([], ["--one-path"], ["--merge"]))
    assert not near(two, one) and near(one, merged)
    assert near(drawn(runs / "hollowed" / "adapter"), two)  # the export says that there was a hollow


def test_tests_take_the_same_options(runs, tmp_path):
    shutil.copytree(runs / "lora", tmp_path / "r")
    words = ["--steps", "1", "--images-per-prompt", "1", "--merge", "--lora-scale", "0.5"]
    status = main(["test", "--run", "r", *words])
    assert status == 0 and Path("r/metrics.json").exists()


def test_a_token_and_its_lora_are_told_by_their_files(tmp_path):
    words = ["--model.adapter", "TokenAndLoRA", "--model.adapter.init_args.lora.class_path", "LoRA"]
    words += ["--model.adapter.init_args.lora.init_args.rank", "4"]
    status = main(
        ["fit", "--config", "textual_inversion", *SHORT[:8], "--trainer.max_steps", "2", "--run", "r", *words]
    )
    assert status == 0
    Path("r/adapter/lora_kohya.safetensors").unlink()  # only some tools want it
    prompts = ["--prompts", "a photo of a <sks> ball"]
    whole = drawn("r/adapter", *prompts)
    assert near(drawn("r/adapter", *prompts, "--merge"), whole)
    drawn("r/adapter", *prompts, "--lora-scale", "0.5")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--merge"], "--merge is for a LoRA, and {run} has learned none; leave it out."),
        (["--lora-scale", "0.5"], "--lora-scale is for a LoRA, and {run} has learned none; leave it out."),
        (
            ["--one-path"],
            "--one-path is for a LoRA that was trained around a hollow, and {run} has",
        ),
    ],
)
def test_options_for_loras_are_refused_elsewhere(trained, said, words, sentence):
    status, told = said(["predict", "--run", trained, "--prompts", "a <sks> ball", *words])
    assert status == 2 and sentence.format(run=trained) in told


def test_one_path_is_for_hollows(runs, said):
    status, told = said(["predict", "--run", runs / "lora", "--prompts", "a sks ball", "--one-path"])
    assert status == 2 and "was trained around a hollow" in told


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["lora", "hollowed_net"])
def test_a_resumed_run_is_bitwise_the_same(runs, config, checkpoint):
    whole = runs / {"lora": "lora", "hollowed_net": "hollowed"}[config]
    words = HOLLOW if config == "hollowed_net" else []
    assert fit("r", *words, config=config, steps=2) == 0
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "4"]) == 0
    mine, theirs = (checkpoint(run)["state_dict"] for run in ("r", whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_resuming_with_another_rank_is_refused(runs, said):
    shutil.copytree(runs / "lora", "r")
    status, told = said(["fit", "--run", "r", "--resume", "--model.adapter.init_args.rank", "8"])
    assert status == 2 and "rank" in told


def test_ctrl_c_in_the_first_stage_keeps_what_is_made(runs, monkeypatch, capsys, checkpoint):
    answer, asked = Hollow.answer, []

    def interrupted(self, module, draw):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(self, module, draw)

    monkeypatch.setattr("mep_lightning.hollow.EVERY", 1)
    monkeypatch.setattr(Hollow, "answer", interrupted)
    assert fit("r", *HOLLOW, config="hollowed_net") == 130
    told = capsys.readouterr().err
    assert "what was made ahead of it is kept. Carry on with: mep fit --run r --resume" in told
    assert fit("r", *HOLLOW, config="hollowed_net") == 2  # its name is taken
    asked.clear()
    monkeypatch.setattr(Hollow, "answer", lambda *given: asked.append(1) or answer(*given))
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert len(asked) == 1 + 4 - 2  # one to learn the shape
    mine, theirs = (checkpoint(run)["state_dict"] for run in ("r", runs / "hollowed"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# -- beside other callbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", ["PUTS", "PriorPreservation"])
def test_the_first_stage_makes_ready_what_steps_will_draw(callback, monkeypatch):
    drawn_for = []
    prepare = HollowedActivations.on_train_start

    def watched(self, trainer, module):
        prepare(self, trainer, module)
        draw = module.draw_at(trainer.datamodule.batch(0), 0)
        drawn_for.append((len(draw.noisy), module.hollow.stored.shape[1], int(draw.timestep[0])))

    monkeypatch.setattr(HollowedActivations, "on_train_start", watched)
    settings = {
        "PUTS": ["--trainer.callbacks.low", "600", "--trainer.callbacks.high", "610"],
        "PriorPreservation": ["--trainer.callbacks.images", "1"],
    }
    words = [*HOLLOW, f"--trainer.callbacks+={callback}", *settings[callback]]
    assert fit("r", *words, config="hollowed_net", steps=2) == 0
    ((rows, stored, timestep),) = drawn_for
    assert rows == stored == (2 if callback == "PriorPreservation" else 1)
    assert 600 <= timestep < 610 or callback != "PUTS"


@pytest.mark.slow
def test_the_plan_before_a_run_knows_the_hollow(monkeypatch):
    seen = []
    monkeypatch.setattr(budget, "identify", lambda name: type("Info", (), {"family": "sd1"})())
    monkeypatch.setattr(budget, "free_bytes", lambda device: 10**12)
    rehearse = budget.rehearse
    monkeypatch.setattr(budget, "rehearse", lambda *a, **k: seen.append(rehearse(*a, **k)) or seen[-1])
    assert fit("r", *HOLLOW, config="hollowed_net", steps=1) == 0
    assert fit("s", config="lora", steps=1) == 0
    ((hollowed,), (whole,)) = seen
    assert "precompute" in hollowed and "precompute" not in whole
    assert hollowed["step"].weights < whole["step"].weights
