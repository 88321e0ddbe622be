"""A cell that dies or hangs is a record, and the others go on; a batch that dies is tried again in halves."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import mep_lightning
from mep_lightning.comparison.cells import RECORD, Cell
from mep_lightning.comparison.engines.local import LocalEngine, Worker, _work

MIB = 2**20


def cell(tmp_path, seed, *words, steps="2"):
    run = str(tmp_path / f"run{seed}")
    fit = ["--config", "textual_inversion", "--run", run, "--trainer.max_steps", steps, "--samples.count", "1"]
    fit += ["--samples.steps", "1", "--model.base", "tiny"]
    test = ["--run", run, "--images-per-prompt", "1", "--steps", "1"]
    return Cell("ti", "ball", seed, tmp_path / f"run{seed}", [*fit, *words], test)


def test_a_mistake_a_hang_and_cells_that_work(tmp_path, monkeypatch):
    cells = [cell(tmp_path, 0, "--model.lr", "-1"), cell(tmp_path, 1), cell(tmp_path, 2)]
    cells.append(cell(tmp_path, 3, steps="100000"))
    found, time_left = {}, Worker.time_left

    def until_it_trains(self, timeout):
        """No time is left once the hanging cell trains: no machine is too slow for the one before it."""
        log = cells[3].run / "log.csv"
        trains = self.left == cells[3:] and log.is_file() and len(log.read_text().splitlines()) > 2
        return -1.0 if trains else time_left(self, 5 * timeout)

    monkeypatch.setattr(Worker, "time_left", until_it_trains)
    with closing(LocalEngine(timeout=60, threads=1).run_all([[one] for one in cells], tmp_path / "logs")) as ended:
        for one, record in ended:
            found[one.seed] = record
    assert found[0] == {"error": "model.lr is -1.0; use a number above 0, or auto.", "kind": "failed"}
    assert found[1]["steps"] == 2 and -1 <= found[1]["dino"] <= 1 and found[1]["storage"] > 0
    assert found[1]["steps_per_second"] > 0 and found[1]["minutes"] > 0 and found[1]["seconds_per_image"] > 0
    assert found[3] == {"error": "not done after 1 minutes", "kind": "time"}
    for figure in ("training_bytes", "inference_bytes"):  # neither libraries nor the cell before it are in them
        assert 35 * MIB < found[1][figure] < 70 * MIB and abs(found[2][figure] - found[1][figure]) < 15 * MIB
    assert "textual_inversion on tiny" in (tmp_path / "logs" / "ti-ball-1.txt").read_text()


def test_a_killed_process_is_told_as_out_of_memory_unless_fewer_cells_fit(tmp_path, monkeypatch):
    give, given = Worker.give, []

    def give_and_kill(self, batch):
        give(self, batch)
        given.append([one.seed for one in batch])
        if len(batch) > 1 or batch[0].seed == 0:
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Worker, "give", give_and_kill)
    wrong = [cell(tmp_path, seed, "--model.lr", "-1") for seed in (1, 2)]
    batches = [[cell(tmp_path, 0), *wrong], [cell(tmp_path, 3, "--model.lr", "-1")]]
    found = {one.seed: record for one, record in LocalEngine(threads=1).run_all(batches, tmp_path / "logs")}
    assert given == [[0, 1, 2], [0, 1], [0], [1], [2], [3]]
    assert found[0] == {"error": "killed, as systems do that run out of memory", "kind": "memory"}
    assert all("model.lr is -1.0" in found[seed]["error"] for seed in (1, 2, 3))


def test_a_process_that_is_told_to_stop_is_no_failure_and_the_others_go_on(tmp_path, monkeypatch):
    give = Worker.give

    one, other = cell(tmp_path, 0, "--trainer.log_every_n_steps", "1", steps="100000"), cell(tmp_path, 1)

    def give_and_stop(self, batch):
        give(self, batch)
        if batch[0] is one:
            log, deadline = one.run / "log.csv", time.monotonic() + 120
            while not (log.is_file() and len(log.read_text().splitlines()) > 2) and time.monotonic() < deadline:
                time.sleep(0.05)
            for _ in range(2):  # a system tells all of a group, and then the parent its own
                self.process.terminate()
        if batch[0].seed == 2:
            self.process.terminate()  # before it can hear

    monkeypatch.setattr(Worker, "give", give_and_stop)
    batches = [[one], [cell(tmp_path, 2), cell(tmp_path, 2)], [cell(tmp_path, 3, "--model.lr", "-1")]]
    found = list(LocalEngine(threads=1).run_all(batches, tmp_path / "logs"))
    assert [record["kind"] for _, record in found] == ["stopped", "stopped", "stopped", "failed"]
    assert (one.run / "checkpoints" / "last.ckpt").is_file(), "after the step that it was at"
    assert not other.run.exists()


def test_a_process_that_is_gone_before_it_is_told_costs_no_cell(tmp_path, monkeypatch):
    give, killed = Worker.give, []

    def give_to_the_dead(self, batch):
        if self.size and not killed:
            killed.append(self.process.pid)
            self.process.kill()
            self.process.join()
        give(self, batch)

    monkeypatch.setattr(Worker, "give", give_to_the_dead)
    cells = [cell(tmp_path, seed) for seed in range(3)]
    for one in cells:  # done, but never heard of
        one.run.mkdir()
        (one.run / RECORD).write_text('{"dino": 0.25}')
    found = list(LocalEngine(threads=1).run_all([[cells[0]], cells[1:]], tmp_path / "logs"))
    assert killed and found == [(one, {"dino": 0.25}) for one in cells]


def test_cells_whose_processes_are_gone_each_time_have_failed(tmp_path, monkeypatch):
    give, given = Worker.give, []

    def give_to_the_dead(self, batch):
        given.append([one.seed for one in batch])
        self.process.kill()
        self.process.join()
        give(self, batch)

    monkeypatch.setattr(Worker, "give", give_to_the_dead)
    cells = [cell(tmp_path, seed) for seed in range(3)]
    found = list(LocalEngine(threads=1).run_all([cells[:2], cells[2:]], tmp_path / "logs"))
    assert given == [[0, 1], [0], [1], [2]]
    assert [record["kind"] for _, record in found] == ["memory"] * 3


def test_a_log_that_cannot_be_opened_is_a_failure(tmp_path):
    wrong = cell(tmp_path, 0)
    (tmp_path / "logs" / "ti-ball-0.txt").mkdir(parents=True)
    ((_, record),) = LocalEngine(threads=1).run_all([[wrong]], tmp_path / "logs")
    assert record["kind"] == "failed" and "died with status 1" in record["error"]


def test_a_process_that_dies_tells_where_its_log_is(tmp_path, monkeypatch):
    give = Worker.give

    def give_and_abort(self, batch):
        give(self, batch)
        os.kill(self.process.pid, signal.SIGABRT)

    monkeypatch.setattr(Worker, "give", give_and_abort)
    ((_, record),) = LocalEngine(threads=1).run_all([[cell(tmp_path, 0)]], tmp_path / "logs")
    log = tmp_path / "logs" / "ti-ball-0.txt"
    assert record == {"error": f"its process died with status -6; {log} may say why", "kind": "failed"}


def test_gpus_are_shared_out(tmp_path):
    def taken(*gpus):
        return [SimpleNamespace(gpu=gpu) for gpu in gpus]

    engine = LocalEngine(3, gpus=["0", "GPU-b"])
    assert [engine._free(taken(*some)) for some in ([], ["0"], ["0", "GPU-b"], ["GPU-b"])] == ["0", "GPU-b", "0", "0"]
    assert LocalEngine(3)._free(taken(None)) is None


def test_a_process_sees_its_own_gpu_alone(tmp_path, monkeypatch):
    theirs, ours = get_context("spawn").Pipe()
    monkeypatch.setattr("mep_lightning.comparison.engines.local.end_with_parent", lambda: None)
    monkeypatch.setattr("mep_lightning.comparison.engines.local.signal.signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ours.close()
    _work(theirs, tmp_path, None, None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    _work(theirs, tmp_path, None, "GPU-b")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"


class Busy:
    """A worker that trains three cells since 100 seconds."""

    size, process = 3, SimpleNamespace(exitcode=None)
    stopped = False
    time_left = Worker.time_left

    def __init__(self):
        self.began = time.monotonic() - 100

    def stop(self, patience):
        self.stopped = True


def test_a_batch_has_as_long_as_its_cells_together():
    patient, hasty = Busy(), Busy()
    assert LocalEngine(timeout=34)._end(patient, True) is None and not patient.stopped
    record = LocalEngine(timeout=30)._end(hasty, True)
    assert record == {"error": "not done after 1.5 minutes, 3 cells together", "kind": "time"} and hasty.stopped


@pytest.mark.slow
def test_who_goes_away_leaves_what_was_trained(tmp_path, monkeypatch):
    one = cell(tmp_path, 0, "--checkpoint.every", "1000", "--trainer.log_every_n_steps", "1", steps="100000")
    log = one.run / "log.csv"

    def until_it_trains(*_):
        deadline = time.monotonic() + 300
        while not (log.is_file() and len(log.read_text().splitlines()) > 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        raise KeyboardInterrupt  # as Ctrl-C does

    monkeypatch.setattr("mep_lightning.comparison.engines.local.wait", until_it_trains)
    with pytest.raises(KeyboardInterrupt), closing(LocalEngine(threads=1).run_all([[one]], tmp_path / "logs")) as ended:
        next(ended)
    assert (one.run / "checkpoints" / "last.ckpt").is_file()


PARENT = """
import os, signal, sys, time
from multiprocessing import get_context
from mep_lightning.comparison.engines.local import end_with_parent

def child(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a Trainer answers it
    end_with_parent()
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(120)

if __name__ == "__main__":
    get_context("spawn").Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(120)
"""


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    script, number = tmp_path / "parent.py", tmp_path / "number"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script, number], env=os.environ | {"PYTHONPATH": str(Path(mep_lightning.__file__).parents[1])}
    )
    child = None
    try:
        deadline = time.monotonic() + 60
        while not number.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child = psutil.Process(int(number.read_text()))
        parent.kill()
        while lives(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lives(child)
    finally:
        parent.kill()
        parent.wait()
        if child is not None and lives(child):
            child.kill()


def lives(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
