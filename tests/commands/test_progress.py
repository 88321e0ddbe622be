"""The live line of `mep fit`."""

import fcntl
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar

from mep_lightning.commands.fit import requested
from mep_lightning.commands.progress import StepProgress
from mep_lightning.commands.training import FitCLI

LINE = r"100%.* 3/3 \[\d+:\d+<\d+:\d+, +[\d.]+(step/s|s/step), loss \d\.\d+, \d+\.\d+ GiB\]$"


def three_steps():
    trainer = SimpleNamespace(is_global_zero=True, max_steps=3, global_step=0, should_stop=False)
    trainer.callback_metrics = {"train/loss": torch.tensor(0.25)}
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    bar = StepProgress()
    bar.on_train_start(trainer, None)
    for trainer.global_step in (1, 2, 3):
        bar.on_train_batch_end(trainer, None)
    bar.on_train_end(trainer, None)


def test_progress_shows_steps_time_left_speed_loss_and_memory(fit, capsys):
    assert fit("--run", "r", steps=3) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(LINE, last), last


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_another_progress_bar_takes_its_place(name):
    cli = FitCLI(requested(["--config", "zoodip", "--run", "r", f"--trainer.callbacks+={name}"])[0])
    assert [type(one).__name__ for one in cli.trainer.callbacks if isinstance(one, ProgressBar)] == [name]


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 90), (1, 90), (24, 90)])
def test_the_line_is_there_on_a_terminal_of_any_size(rows, columns, monkeypatch):
    """Some pseudo-terminals say that they have no rows or columns; tqdm alone would show nothing there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(theirs, "w") as terminal, open(ours, "rb", buffering=0) as screen:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            three_steps()
        terminal.write("done")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"done"):
            shown += screen.read(4096)
    last = shown.decode().removesuffix("done").strip().split("\r")[-1].strip()
    assert re.search(LINE, last), shown.decode()
    assert len(last) <= (columns or 101)


def test_a_log_file_gets_every_line_once(capsys):
    three_steps()
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if "3/3" in line]
    assert len(lines) == len(set(lines)) >= 1, told
    assert "\r" not in told
