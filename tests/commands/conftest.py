"""What the tests of the commands share: an empty folder to work in, a short training, and the sentence on stderr."""

import signal
from pathlib import Path

import pytest
import torch
import yaml

from mep_lightning.cli import main

QUICK = [
    *("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0"),
    *("--checkpoint.every", "4", "--model.subspace.tau", "4", "--trainer.log_every_n_steps", "1"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEP_RUN", raising=False)
    monkeypatch.delenv("MEP_DEBUG", raising=False)


@pytest.fixture(autouse=True)
def _with_the_signals_as_they_were():
    """Lightning ignores Ctrl-C from the moment that one has ended its training."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quick():
    """Settings that make a run short."""
    return list(QUICK)


@pytest.fixture
def fit():
    """Runs `mep fit` for a few steps and returns its status."""
    return _fit


def _fit(*words, config="zoodip", steps=3):
    return main(["fit", "--config", config, *QUICK, "--trainer.max_steps", str(steps), *map(str, words)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of 10 steps, to be left as it is."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert _fit("--run", run, steps=10) == 0
    return run


@pytest.fixture
def config_of():
    """The settings that a run has written."""
    return lambda run: yaml.safe_load(Path(run, "config.yaml").read_text())


@pytest.fixture
def checkpoint():
    """A run's last checkpoint."""
    return lambda run: torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True)


@pytest.fixture
def said(capsys):
    """Runs a command line that is wrong: its exit status, and the one sentence that is all of stderr."""

    def run(words):
        capsys.readouterr()
        status = main(list(map(str, words)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert 1 <= len(lines) <= 2, lines
        assert not any("Traceback" in line or "usage:" in line for line in lines)
        return status, lines[-1]

    return run
