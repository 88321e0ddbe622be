"""Runs of `mep fit` that train in one batch: each is left as if it had been alone, and goes on alone or with others."""

import csv
import json
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mep_lightning.commands import fit, together
from mep_lightning.commands.keeping import RunLog
from mep_lightning.errors import UserError
from mep_lightning.tiny.subjects import subject

STEPS = 4
QUICK = [
    *("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--checkpoint.every", "2"),
    *("--model.base", "tiny", "--model.subspace.tau", "2", "--trainer.log_every_n_steps", "1"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of two subjects, by class word."""
    found = {}
    for one in map(subject, range(2)):
        found[one.class_word] = tmp_path_factory.mktemp(one.class_word)
        for number, photo in enumerate(one.photos()):
            photo.save(found[one.class_word] / f"{number}.png")
    return found


def line(photos, word, run, *more, config="zoodip", steps=STEPS):
    mine = ["--config", config, "--run", str(run), "--data.path", str(photos[word]), "--data.class_word", word]
    return [*mine, "--trainer.max_steps", str(steps), *QUICK, *more]


def resumed(*runs, steps=STEPS):
    return [["--run", str(run), "--resume", "--trainer.max_steps", str(steps)] for run in runs]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Runs that trained together, and the same alone."""
    root = tmp_path_factory.mktemp("runs")
    assert together.train([line(photos, word, root / "together" / word) for word in photos]) == 0
    for word in photos:
        assert fit.run(line(photos, word, root / "alone" / word)) == 0
    return root


def token(run):
    return load_file(run / "adapter/learned_embeds.safetensors")["<sks>"]


def log(run):
    with open(run / "log.csv", newline="") as file:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file)]


def near(one, other):
    """As near as a batch's rounding leaves finite differences; a step moves a token by more than .05."""
    return (token(one) - token(other)).norm() < 0.01


@pytest.mark.parametrize("word", ["ball", "cube"])
def test_each_is_left_as_if_it_had_been_alone(word, trained):
    own, alone = trained / "together" / word, trained / "alone" / word
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (own, alone)]
    assert files[0] == files[1] and "samples/before_after.png" in files[0] and "checkpoints/last.ckpt" in files[0]
    assert yaml.safe_load((own / "config.yaml").read_text()) == yaml.safe_load((alone / "config.yaml").read_text())
    assert near(own, alone)
    assert (token(own) - token(trained / "together" / {"ball": "cube", "cube": "ball"}[word])).norm() > 0.1
    assert [step for step, _ in log(own)] == list(range(STEPS))
    assert [loss for _, loss in log(own)] == pytest.approx([loss for _, loss in log(alone)], rel=0.02)


def test_memory_is_told_as_the_batchs(trained):
    ball, cube, alone = (
        json.loads((trained / run / "memory.json").read_text())
        for run in ("together/ball", "together/cube", "alone/ball")
    )
    assert ball == cube and ball["subjects"] == 2 and "subjects" not in alone
    assert "of 2 subjects that trained together" in (trained / "together/cube/report.html").read_text()
    assert "trained together" not in (trained / "alone/cube/report.html").read_text()


def test_stopped_and_resumed_they_are_bitwise_the_same(photos, trained, tmp_path, monkeypatch):
    runs = [tmp_path / word for word in photos]
    write = RunLog.log_metrics
    signals = [signal.SIGTERM]

    def write_and_stop(self, metrics, step=None):
        write(self, metrics, step)
        if step == 2 and signals:
            signal.raise_signal(signals.pop())

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "log_metrics", write_and_stop)
        assert together.train([line(photos, run.name, run) for run in runs]) == 128 + signal.SIGTERM
    steps = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] for run in runs]
    assert steps == [3, 3]
    assert together.train(resumed(*runs)) == 0
    for run in runs:
        assert torch.equal(token(run), token(trained / "together" / run.name))
        assert log(run) == log(trained / "together" / run.name)


def test_each_goes_on_alone_or_beside_one_from_elsewhere(trained, tmp_path):
    for name, source in (("a", "together/ball"), ("b", "alone/ball"), ("c", "together/cube")):
        shutil.copytree(trained / source, tmp_path / name)
    assert fit.run(*resumed(tmp_path / "a", steps=6)) == 0
    assert together.train(resumed(tmp_path / "c", tmp_path / "b", steps=6)) == 0
    assert near(tmp_path / "a", tmp_path / "b")
    assert not near(tmp_path / "a", trained / "together/ball") and not near(tmp_path / "c", trained / "together/cube")
    assert [step for step, _ in log(tmp_path / "b")] == list(range(6))


def test_a_damaged_checkpoint_is_told_and_the_settings_stay(trained, tmp_path):
    runs = [tmp_path / word for word in ("ball", "cube")]
    for run in runs:
        shutil.copytree(trained / "together" / run.name, run)
    before = [(run / "config.yaml").read_text() for run in runs]
    damaged = runs[1] / "checkpoints/last.ckpt"
    content = torch.load(damaged, weights_only=True)
    content["optimizer_states"][0]["state"] = {0: {"step": "no number"}}
    torch.save(content, damaged)
    with pytest.raises(UserError, match="last.ckpt cannot be gone on from .*: it is damaged; go on with each alone"):
        together.train(resumed(*runs, steps=6))
    assert [(run / "config.yaml").read_text() for run in runs] == before


def test_what_is_done_is_not_done_again(trained, capsys):
    runs = [trained / "together" / word for word in ("ball", "cube")]

    def written():
        return {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}

    before = written()
    assert together.train(resumed(*runs)) == 0
    assert "All 2 are at step 4. Nothing is left to train." in capsys.readouterr().out
    assert written() == before


@pytest.mark.parametrize(
    ("config", "words", "why"),
    [
        ("zoodip", [], None),
        ("zoodip_style", [], None),
        ("textual_inversion_lite", [], None),
        ("zoodip", ["--model.lr", "-1"], None),  # a mistake, which its own run will tell
        ("lora", [], "its adapter is LoRA"),
        ("hollowed_net", [], "its adapter is LoRA"),
        ("gf_ti", [], "its estimator is CMAES"),
        ("zoodip", ["--trainer.max_time", "00:01:00:00"], "its callback Timer looks after one run"),
        ("zoodip", ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x"], "it has a logger of its own"),
        ("zoodip", ["--trainer.plugins", "TorchCheckpointIO"], "its checkpoints have a keeper of their own"),
        ("zoodip", ["--data.repeats", "2"], "it ends with an epoch"),
        ("zoodip", ["--budget", "2GB"], "--budget chooses what it is"),
    ],
)
def test_who_cannot_train_beside_others_is_known_beforehand(config, words, why, photos, tmp_path):
    run = tmp_path / "run"
    (run / "half").mkdir(parents=True)  # what an earlier try left is in nobody's way
    mine = ["--config", config, "--run", str(run), "--data.path", str(photos["ball"]), "--data.class_word", "ball"]
    assert together.why_alone([*mine, "--model.base", "tiny", *words]) == why
    assert [path.name for path in run.iterdir()] == ["half"]


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("zoodip", ["--model.lr", "1.0"], "the subjects of a SubjectBatch differ in lr"),
        ("zoodip", ["--trainer.max_steps", "9"], "differ in trainer.max_steps: give both the same"),
        ("lora", [], "cannot train beside others, as its adapter is LoRA: train it alone"),
    ],
)
def test_runs_that_are_unlike_are_refused(config, words, message, photos, tmp_path):
    lines = [line(photos, "ball", tmp_path / "a"), line(photos, "cube", tmp_path / "b", *words)]
    if config == "lora":
        lines[1] = ["--config", config, *lines[1][2:10]]
    with pytest.raises(UserError, match=message):
        together.train(lines)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_what_does_not_fit_together_is_told_before_anything_is_written(photos, tmp_path, monkeypatch):
    def refuse(*_, subjects, **__):
        raise UserError(f"{subjects} are too many")

    monkeypatch.setattr(together, "refuse_too_large", refuse)
    lines = [line(photos, word, tmp_path / word) for word in photos]
    with pytest.raises(UserError, match="2 are too many"):
        together.train(lines)
    assert list(tmp_path.iterdir()) == []
