"""`mep fit` over several processes: one folder, the bits of one process, and a process that is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from mep_lightning.cli import main
from mep_lightning.commands.training import step_of
from mep_lightning.distributed import LostRankError
from mep_lightning.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
TWO = ("--trainer.devices", "2", "--trainer.strategy", "zo_ddp", "--trainer.accelerator", "cpu")
SHORT = ("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--checkpoint.every", "2")


def started(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mep_lightning.cli", "fit", "--config", "zoodip", *TWO, *SHORT, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_one_folder_and_the_bits_of_one_process_also_where_one_goes_on_alone(tmp_path, monkeypatch):
    process = started(tmp_path, "--trainer.max_steps", "4")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert said.count("Training for 4 steps.") == 1
    monkeypatch.chdir(tmp_path)
    assert os.listdir("runs") == ["zoodip-1"]
    alone = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    assert main(["fit", "--run", "runs/zoodip-1", "--resume", "--trainer.max_steps", "6", *alone]) == 0
    assert main(["fit", "--config", "zoodip", *SHORT, "--trainer.max_steps", "6", "--run", "one"]) == 0
    shared, one = (
        load_file(RunFolder(Path(run)).adapter / "learned_embeds.safetensors") for run in ("runs/zoodip-1", "one")
    )
    assert shared.keys() == one.keys() and all((shared[key] == one[key]).all() for key in one)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_a_lost_process_ends_the_run_which_can_be_carried_on(tmp_path, monkeypatch):
    process = started(tmp_path, "--trainer.max_steps", "100000", "--run", "r")
    kept = RunFolder(tmp_path / "r").last_checkpoint
    for _ in range(600):
        if kept.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    assert kept.exists(), process.communicate(timeout=60)[0]
    (other,) = (child for child in psutil.Process(process.pid).children() if "mep_lightning.cli" in child.cmdline())
    os.kill(other.pid, signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert "One of the processes that train together was killed (SIGKILL): the others end." in said
    if process.returncode != -signal.SIGKILL:  # Lightning gives the first process five seconds
        assert process.returncode == 2, said
        assert said.rstrip().endswith(
            "mep fit: one of the 2 processes that train together is gone, or was too slow; carry on, with as many "
            "processes as there are: mep fit --run r --resume"
        )
        assert "Traceback" not in said
    monkeypatch.chdir(tmp_path)
    end = str(step_of(kept) + 2)
    alone = ["--trainer.max_steps", end, "--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main(["fit", "--run", "r", "--resume", *alone]) == 0
    assert step_of(kept) == int(end) and RunFolder(Path("r")).adapter.is_dir()


def test_what_is_said_of_a_lost_process(tmp_path, monkeypatch, capsys):
    """As above, whatever Lightning does meanwhile; before the first step nothing that was made is thrown away."""
    monkeypatch.chdir(tmp_path)
    lost = LostRankError("one is gone")

    def loses(*_):
        raise lost

    monkeypatch.setattr("mep_lightning.module.give_gradient", loses)
    assert main(["fit", "--config", "zoodip", *SHORT, "--trainer.max_steps", "3", "--run", "r"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == ("mep fit: one is gone; carry on, with as many processes as there are: mep fit --run r --resume")
    assert RunFolder(Path("r")).config.is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_whichever_process_is_told_to_stop_all_stop_after_the_same_step(tmp_path):
    process = started(tmp_path, "--trainer.max_steps", "100000", "--run", "r", "--checkpoint.every", "1000")
    log = RunFolder(tmp_path / "r").log
    for _ in range(600):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    (other,) = (child for child in psutil.Process(process.pid).children() if "mep_lightning.cli" in child.cmdline())
    os.kill(other.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGKILL), said
    assert RunFolder(tmp_path / "r").last_checkpoint.exists()


@pytest.mark.parametrize(
    "launcher",
    [{"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, {"NODE_RANK": "1"}],
    ids=["torchrun", "SLURM", "another node"],
)
def test_a_launchers_processes_must_be_told_their_folder(launcher, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "--config", "zoodip"]) == 2
    assert "a launcher started several processes, each of which would make a folder: give --run DIR." in (
        capsys.readouterr().err
    )
    assert os.listdir(tmp_path) == []
