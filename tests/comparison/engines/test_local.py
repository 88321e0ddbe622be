"""A cell that dies or hangs is a record, and the others go on."""

import os
import signal
import time
from contextlib import closing

import pytest

from mep_lightning.comparison.cells import Cell
from mep_lightning.comparison.engines.local import LocalEngine, Worker


def cell(tmp_path, seed, *words, steps="2"):
    run = str(tmp_path / f"run{seed}")
    fit = ["--config", "textual_inversion", "--run", run, "--trainer.max_steps", steps, "--samples.count", "1"]
    fit += ["--samples.steps", "1", "--model.base", "tiny"]
    test = ["--run", run, "--images-per-prompt", "1", "--steps", "1"]
    return Cell("ti", "ball", seed, tmp_path / f"run{seed}", [*fit, *words], test)


def test_a_mistake_a_hang_and_a_cell_that_works(tmp_path):
    cells = [cell(tmp_path, 0, "--model.lr", "-1"), cell(tmp_path, 1), cell(tmp_path, 2, steps="100000")]
    found = {}
    with closing(LocalEngine(timeout=40, threads=1).run_all(cells, tmp_path / "logs")) as ended:
        for one, record in ended:
            found[one.seed] = record
    assert found[0] == {"error": "model.lr is -1.0; use a number above 0, or auto.", "kind": "failed"}
    assert found[1]["steps"] == 2 and -1 <= found[1]["dino"] <= 1 and found[1]["storage"] > 0
    assert found[1]["steps_per_second"] > 0 and found[1]["minutes"] > 0 and found[1]["seconds_per_image"] > 0
    assert found[2] == {"error": "not done after 0.666667 minutes", "kind": "time"}
    assert "textual_inversion on tiny" in (tmp_path / "logs" / "ti-ball-1.txt").read_text()


def test_a_killed_process_is_told_as_out_of_memory(tmp_path, monkeypatch):
    give = Worker.give

    def give_and_kill(self, one):
        give(self, one)
        if one.seed == 0:
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Worker, "give", give_and_kill)
    cells = [cell(tmp_path, 0), cell(tmp_path, 1, "--model.lr", "-1")]
    found = {one.seed: record for one, record in LocalEngine(threads=1).run_all(cells, tmp_path / "logs")}
    assert found[0] == {"error": "killed, as systems do that run out of memory", "kind": "memory"}
    assert found[1]["kind"] == "failed"


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
    with pytest.raises(KeyboardInterrupt), closing(LocalEngine(threads=1).run_all([one], tmp_path / "logs")) as ended:
        next(ended)
    assert (one.run / "checkpoints" / "last.ckpt").is_file()
