"""Stopping and resuming: nothing is lost, the result is bitwise the same, and what cannot be resumed is said."""

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

import mep_lightning
from mep_lightning.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mep_lightning.__file__).parents[1])}


@pytest.fixture
def interrupt(monkeypatch):
    """Sends Ctrl-C from within a training step, as often as asked."""
    from mep_lightning import PersonalizationModule

    step = PersonalizationModule.training_step

    def arrange(at=None, times=1, number=signal.SIGINT):
        def interrupted(self, batch, batch_idx):
            result = step(self, batch, batch_idx)
            if self.global_step == at:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
            return result

        monkeypatch.setattr(PersonalizationModule, "training_step", interrupted)

    return arrange


def test_ctrl_c_saves_everything_and_the_resumed_run_is_bitwise_the_same(fit, checkpoint, trained, interrupt, capsys):
    interrupt(at=6)
    assert fit("--run", "r", steps=10) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == ("mep fit: stopped; all is saved up to step 6 of 10. Carry on with: mep fit --run r --resume")
    assert checkpoint("r")["global_step"] == 6
    assert Path("r/adapter/learned_embeds.safetensors").exists()
    assert Path("r/report.html").exists()

    interrupt()  # never again
    assert main(["fit", "--run", str(Path("r").absolute()), "--resume"]) == 0
    once, twice = checkpoint(trained), checkpoint("r")
    assert twice["global_step"] == 10
    assert torch.equal(once["state_dict"]["adapter.theta"], twice["state_dict"]["adapter.theta"])
    for key, value in once["optimizer_states"][0]["state"][0].items():
        assert torch.equal(value, twice["optimizer_states"][0]["state"][0][key])
    for key, value in once["mep"]["subspace"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(twice["mep"]["subspace"][key]))
    assert Path("r/samples/after.png").read_bytes() == (trained / "samples/after.png").read_bytes()


def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(fit, trained, interrupt):
    interrupt(at=6)
    fit("--run", "r", steps=10)
    interrupt()  # never again
    # Rows after the last checkpoint, and half a row, as a kill leaves them: they are made again and stand there once.
    run = Path("r").absolute()
    with open(run / "log.csv", "a") as file:
        file.write("0,8,9.0,9.0\n0")
    assert main(["fit", "--run", str(run), "--resume"]) == 0
    logs = [list(csv.DictReader((path / "log.csv").read_text().splitlines())) for path in (trained, run)]
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in logs[1]] == list(range(10))


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(fit, checkpoint, interrupt, capsys):
    interrupt(at=6, times=2)
    assert fit("--run", "r", steps=10) == 130
    assert "all is saved up to step 4 of 10" in capsys.readouterr().err
    assert checkpoint("r")["global_step"] == 4


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_too_however_often_it_is_told(fit, checkpoint, interrupt, times):
    interrupt(at=6, number=signal.SIGTERM, times=times)
    assert fit("--run", "r", steps=10) == 128 + signal.SIGTERM
    assert checkpoint("r")["global_step"] == 6


def test_ctrl_c_before_the_first_step_leaves_nothing(fit, monkeypatch, capsys):
    from mep_lightning import PersonalizationModule

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PersonalizationModule, "load", interrupted)
    assert fit("--run", "r") == 130
    assert "stopped before the first step; nothing is kept." in capsys.readouterr().err
    assert not Path("r").exists()


def test_pictures_of_the_class_are_kept_when_ctrl_c_comes_before_the_first_step(fit, monkeypatch, capsys):
    from mep_lightning import PersonalizationModule

    def interrupted(self, *_):
        Path("r/prior").mkdir()
        Path("r/prior/00000.png").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(PersonalizationModule, "load", interrupted)
    assert fit("--run", "r") == 130
    assert "what was made ahead of it is kept. Carry on with: mep fit --run r --resume" in capsys.readouterr().err
    assert Path("r/prior/00000.png").is_file() and Path("r/config.yaml").is_file()


def test_sigterm_ends_what_is_made_ahead_of_the_first_step(photo_folder, monkeypatch, capsys):
    from mep_lightning.hollow import Hollow

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Hollow, "prepare", lambda *_: signal.raise_signal(signal.SIGTERM))
    words = ["--config", "hollowed_net", "--data.path", str(photo_folder), "--data.class_word", "ball"]
    assert main(["fit", *words, "--run", "r", "--samples.count", "1", "--samples.every", "0"]) == 143
    assert "stopped before the first step; nothing is kept." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_shells_own_handlers_are_back_after_a_run(fit):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit("--run", "r", steps=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(checkpoint, quick):
    words = ["fit", "--config", "zoodip", *quick, "--trainer.max_steps", "30", "--run"]
    assert main([*words, "whole"]) == 0
    process = subprocess.Popen([sys.executable, "-m", "mep_lightning.cli", *words, "r"], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not Path("r/checkpoints/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < checkpoint("r")["global_step"] < 30
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert torch.equal(*(checkpoint(run)["state_dict"]["adapter.theta"] for run in ("whole", "r")))


def test_a_finished_run_says_how_to_go_on_and_does(config_of, checkpoint, trained, capsys):
    shutil.copytree(trained, "moved")  # a run's folder may be moved
    before = checkpoint("moved")["state_dict"]["adapter.theta"]
    for words in ([], ["--trainer.max_steps", "3"]):
        assert main(["fit", "--run", "moved", "--resume", *words]) == 0
        shown = capsys.readouterr().out
        assert "moved is at step 10. Nothing is left to train; add --trainer.max_steps" in shown
        assert "Resuming" not in shown
    assert main(["fit", "--run", "moved", "--resume", "--trainer.max_steps", "12"]) == 0
    assert checkpoint("moved")["global_step"] == 12
    assert config_of("moved")["trainer"]["max_steps"] == 12
    assert not torch.equal(checkpoint("moved")["state_dict"]["adapter.theta"], before)  # lr had come to 0


def test_a_damaged_checkpoint_is_named(said, trained):
    shutil.copytree(trained, "r")
    Path("r/checkpoints/last.ckpt").write_bytes(b"PK\x03\x04 half")
    status, sentence = said(["fit", "--run", "r", "--resume"])
    assert status == 2
    assert "r/checkpoints/last.ckpt cannot be read" in sentence
    assert "delete it" in sentence


def test_a_run_that_was_killed_after_its_last_step_is_brought_to_its_end(trained, capsys):
    shutil.copytree(trained, "r")
    export = "adapter/learned_embeds.safetensors"
    for name in (export, "samples/after.png", "samples/before_after.png", "report.html"):
        Path("r", name).unlink()
    Path("r/adapter/.tmp-1-learned_embeds.safetensors").write_bytes(b"half")
    memory = Path("r/memory.json").read_text()
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert "Resuming at step 10, the last: what comes after the training is still to be made" in capsys.readouterr().out
    learned = [load_file(run / export) for run in (trained, Path("r"))]
    assert learned[0].keys() == learned[1].keys()
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert Path("r/samples/after.png").read_bytes() == (trained / "samples/after.png").read_bytes()
    assert Path("r/samples/before_after.png").is_file() and "</html>" in Path("r/report.html").read_text()
    assert Path("r/memory.json").read_text() == memory  # the training's own
    assert not list(Path("r").rglob(".tmp-*"))
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert "Nothing is left to train" in capsys.readouterr().out


def test_a_folder_in_which_a_kill_left_half_a_file_alone_is_free(fit):
    Path("r").mkdir()
    Path("r/.tmp-1-config.yaml").write_text("mod")
    assert fit("--run", "r", steps=1) == 0


class Malice:
    """What a pickle could do, were it loaded."""

    def __reduce__(self):
        return os.mkdir, ("escaped",)


@pytest.mark.parametrize("words", [["fit", "--resume"], ["predict", "--prompts", "a {}"]], ids=["resumed", "drawn"])
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(said, checkpoint, trained, words):
    shutil.copytree(trained, "r")
    shutil.rmtree("r/adapter")
    torch.save({**checkpoint("r"), "callbacks": Malice()}, "r/checkpoints/last.ckpt")
    status, sentence = said([*words, "--run", "r"])
    assert status == 2
    assert "r/checkpoints/last.ckpt cannot be read (UnpicklingError)" in sentence
    assert not Path("escaped").exists()


DAMAGED_STATE = {
    "loops": lambda state: state["loops"]["fit_loop"].update(state_dict=3, epoch_progress="x"),
    "optimizer": lambda state: state["optimizer_states"][0].update(param_groups=[]),
    "moments": lambda state: state["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("nan")),
    "shape": lambda state: state["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(())),
    "count": lambda state: state["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready={}),
    "progress": lambda state: state["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"].update(
        total={"ready": 8, "completed": "x"}
    ),
    "values": lambda state: state["state_dict"]["adapter.theta"].fill_(float("inf")),
    "kind": lambda state: state["state_dict"].update({"adapter.theta": "x"}),
    "step": lambda state: state.update(global_step="x" * 3000),
    "counts": lambda state: state["mep"].update(skipped="many"),
    "subspace": lambda state: state["mep"]["subspace"].update(seen=None),
}


@pytest.mark.parametrize("damage", DAMAGED_STATE)
def test_a_checkpoint_that_holds_something_else_is_a_sentence(said, checkpoint, trained, damage):
    shutil.copytree(trained, "r")
    state = checkpoint("r")
    DAMAGED_STATE[damage](state)
    torch.save(state, "r/checkpoints/last.ckpt")
    settings = Path("r/config.yaml").read_text()
    status, sentence = said(["fit", "--run", "r", "--resume", "--trainer.max_steps", "12"])
    assert status == 2
    assert sentence.startswith("mep fit: r/checkpoints/last.ckpt") and "damaged" in sentence
    assert len(sentence) < 400
    assert Path("r/config.yaml").read_text() == settings


@pytest.mark.parametrize(
    "key",
    [
        *("global_step", "optimizer_states", "optimizer_states/0/state", "lr_schedulers", "pytorch-lightning_version"),
        *("mep", "mep/precision", "mep/subspace", "mep/subspace/tau", "state_dict", "state_dict/adapter.theta"),
    ],
)
def test_a_checkpoint_that_lacks_a_key_is_refused(checkpoint, said, trained, key):
    shutil.copytree(trained, "r")
    state = node = checkpoint("r")
    *parents, name = key.split("/")
    for part in parents:
        node = node[int(part) if part.isdecimal() else part]
    del node[name]
    torch.save(state, "r/checkpoints/last.ckpt")
    status, sentence = said(["fit", "--run", "r", "--resume", "--trainer.max_steps", "12"])
    assert status == 2
    assert sentence.startswith("mep fit: r/checkpoints/last.ckpt")
    assert "lacks" in sentence or "has no key" in sentence
    assert name in sentence


def test_a_checkpoint_with_an_empty_subspace_is_refused(checkpoint, said, trained):
    shutil.copytree(trained, "r")
    state = checkpoint("r")
    state["mep"]["subspace"] = {}
    torch.save(state, "r/checkpoints/last.ckpt")
    status, sentence = said(["fit", "--run", "r", "--resume", "--trainer.max_steps", "12"])
    assert status == 2
    assert "r/checkpoints/last.ckpt: the checkpoint's SubspaceGradient lacks tau" in sentence


CHANGES = {
    "--model.lr 1": ("model.lr is 1.0", "0.005"),
    "--model.adapter.token <zz>": ('model.adapter.token is "<zz>"', '"<sks>"'),
    "--model.estimator SPSAEstimator": ('model.estimator is "SPSAEstimator"', '"RandomGradientEstimator"'),
    "--model.estimator.mu 0.5": ("model.estimator.mu is 0.5", "0.001"),
    "--model.subspace.tau 9": ("model.subspace.tau is 9", "4"),
    "--model.subspace null": ("model.subspace is null", '"SubspaceGradient"'),
    "--model.precision fp32": ('model.precision is "fp32"', '"int8"'),
    "--data.class_word cat": ('data.class_word is "cat"', '"ball"'),
    "--data.path PHOTOS": ("data.path is", "null"),
    "--data.flip true": ("data.flip is true", "false"),
    "--config other.yaml": ("model.seed is 7", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_cannot_change_what_is_learned(said, trained, change, photo_folder):
    shutil.copytree(trained, "r")
    settings = Path("r/config.yaml").read_text()
    Path("other.yaml").write_text("model: {seed: 7}")
    words = change.replace("PHOTOS", str(photo_folder)).split()
    status, sentence = said(["fit", "--run", "r", "--resume", "--trainer.max_steps", "12", *words])
    now, before = CHANGES[change]
    assert status == 2
    assert sentence.startswith(f"mep fit: {now}")
    assert sentence.endswith(f"but r was begun with {before}; leave it out, or start a new run with it.")
    assert Path("r/config.yaml").read_text() == settings


def test_a_resumed_run_may_change_how_it_is_watched(trained, config_of, checkpoint):
    shutil.copytree(trained, "r")
    words = ("--samples.every", "5", "--checkpoint.every", "3", "--trainer.log_every_n_steps", "2")
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "12", *words]) == 0
    assert config_of("r")["samples"]["every"] == 5
    assert checkpoint("r")["global_step"] == 12


def test_a_resumed_run_may_change_memory_and_speed(trained, config_of, checkpoint, monkeypatch):
    shutil.copytree(trained, "r")
    words = ["--model.cuda_graph", "true", "--model.checkpointing", "true", "--trainer.max_steps", "12"]
    words += ["--model.members_at_once", "1"]
    noted = []
    monkeypatch.setattr("mep_lightning.advice.rank_zero_warn", noted.append)
    assert main(["fit", "--run", "r", "--resume", *words]) == 0
    idle = [f"model.{switch} does nothing here" for switch in ("cuda_graph", "checkpointing")]
    assert [note.partition(":")[0] for note in noted] == idle
    assert checkpoint("r")["global_step"] == 12
    model = config_of("r")["model"]
    assert model["cuda_graph"] and model["checkpointing"] and model["members_at_once"] == 1


class Unchanging(CSVLogger):
    """A logger that takes no other value for a setting than the one that it was given first, as MLflow's does."""

    def log_hyperparams(self, params):
        if params.get("trainer.max_steps", 10) != 10:
            raise ValueError("trainer.max_steps was 10")


def test_a_resumed_run_goes_on_though_its_logger_keeps_the_old_settings(trained, checkpoint, capsys):
    shutil.copytree(trained, "r")
    words = ["--trainer.logger", "Unchanging", "--trainer.logger.save_dir", "csv", "--trainer.max_steps", "11"]
    assert main(["fit", "--run", "r", "--resume", *words]) == 0
    told = capsys.readouterr().out
    assert "Note: Unchanging does not take the settings (trainer.max_steps was 10); config.yaml has them." in told
    assert checkpoint("r")["global_step"] == 11


def test_a_checkpoint_from_before_there_were_activations_goes_on(trained, checkpoint):
    shutil.copytree(trained, "r")
    old = checkpoint("r")
    del old["mep"]["settings"]["activations"]
    torch.save(old, "r/checkpoints/last.ckpt")
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "11"]) == 0
    assert checkpoint("r")["global_step"] == 11


def test_photos_may_have_moved_when_a_run_is_resumed(fit, config_of, checkpoint, photo_folder):
    assert fit("--data.path", photo_folder, "--data.class_word", "ball", "--run", "r", steps=1) == 0
    moved = photo_folder.rename(photo_folder.with_name("moved"))
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "2", "--data.path", str(moved)]) == 0
    assert config_of("r")["data"]["path"] == str(moved)
    assert checkpoint("r")["global_step"] == 2


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(fit, checkpoint, capsys, monkeypatch, by_torch):
    assert fit("--run", "r", steps=4) == 0
    capsys.readouterr()
    save = torch.save

    def full(obj, path, *args, **kwargs):
        save(obj, path, *args, **kwargs)
        if by_torch:  # its own words for it
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    status = main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "8"])
    assert status == 1
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint("r")["global_step"] == 4


def test_a_folder_that_may_not_be_written_to_is_a_sentence_and_loses_nothing(
    fit, said, checkpoint, capsys, monkeypatch
):
    assert fit("--run", "r", steps=4) == 0
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    touch = Path.touch

    def refused(path, *args, **kwargs):
        if "checkpoints" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refused)
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "8"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("r/checkpoints cannot be used (Permission denied); change its rights or give another one.")
    assert checkpoint("r")["global_step"] == 4
    assert all(path.is_file() for path in before)


DAMAGES = {
    "model: 3": "model",
    "data: []": "data",
    "model: {base: [1]}": "model.base",
    "model: {base: tiny, precision: 7}": "model.precision",
}


@pytest.mark.parametrize("words", [(), ("--model.base", "tiny", "--model.precision", "int8")], ids=["alone", "hidden"])
@pytest.mark.parametrize("text", DAMAGES)
def test_damaged_settings_are_named_with_their_key(said, trained, text, words):
    shutil.copytree(trained, "r")
    Path("r/config.yaml").write_text(text)
    status, sentence = said(["fit", "--run", "r", "--resume", *words])
    assert status == 2
    assert sentence.startswith("mep fit: r/config.yaml: ")
    assert DAMAGES[text] in sentence
