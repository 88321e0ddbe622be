"""The settings of a run, as others are told them."""

from pathlib import Path

import pytest

from mep_lightning.commands.fit import requested
from mep_lightning.commands.settings import hyperparameters
from mep_lightning.comparison.preflight import Settings
from mep_lightning.errors import UserError


def settings(*words):
    return Settings(requested(["--config", "zoodip", "--run", "r", *words])[0]).config


def test_an_experiment_logger_is_told_every_setting_by_its_dotted_key():
    told = hyperparameters(settings("--model.estimator.n", "4", "--trainer.callbacks+=Timer", "--seed_everything", "3"))
    assert told["model.estimator"] == "RandomGradientEstimator"
    assert (told["model.estimator.n"], told["model.subspace.nu"]) == (4, 0.01)
    assert (told["seed_everything"], told["model.seed"], told["data.path"]) == (3, 3, None)
    assert (told["trainer.callbacks.PUTS.low"], told["trainer.callbacks.Timer.interval"]) == (0, "step")
    assert not [value for value in told.values() if isinstance(value, dict)]
    assert "config" not in told and "trainer.default_root_dir" not in told


def test_an_experiment_logger_is_not_told_of_itself():
    """Its own settings may hold a key that is nobody else's."""
    told = hyperparameters(settings("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "secret"))
    assert "secret" not in told.values() and not [key for key in told if key.startswith("trainer.logger")]


def test_epochs_with_an_end_are_an_end_to_run_to():
    words = ("--model.lr_scheduler", "linear", "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "3")
    assert settings(*words, "--trainer.max_epochs", "2").trainer.max_epochs == 2
    with pytest.raises(UserError, match="is no end to run to"):
        settings(*words)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ("PriorPreservation", []),
        ("HollowedActivations", ["--trainer.callbacks.fraction", "0.4", "--trainer.callbacks.samples", "4"]),
    ],
)
def test_a_callbacks_folder_is_the_same_one_from_wherever_a_run_is_resumed(callback, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(name):
        told = ["--trainer.callbacks.folder", name] if name else []
        return settings(f"--trainer.callbacks+={callback}", *words, *told).trainer.callbacks[-1].init_args.folder

    assert folder("kept") == str(tmp_path / "kept")
    assert folder("/kept") == "/kept"
    assert folder("~/kept") == str(Path.home() / "kept")
    assert folder(None) is None
