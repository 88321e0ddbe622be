"""Cells as tasks of a Ray cluster: the same table, and what is lost with a worker is begun again."""

import json
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from mep_lightning.cli import main
from mep_lightning.comparison.cells import Cell
from mep_lightning.comparison.engines import ray as engine
from mep_lightning.comparison.engines.ray import RayEngine
from mep_lightning.errors import UserError

SHORT = ["--methods", "textual_inversion", "--subjects", "2", "--max-steps", "2", "--images-per-prompt", "1"]
SHORT += ["--fit=--samples.steps 1", "--prompts", "prompts.txt", "--threads", "1", "--subjects-per-batch", "2"]
MEASURED = ("training_bytes", "inference_bytes", "steps_per_second", "minutes", "seconds_per_image")
"""What hangs on the machine's day."""


@pytest.fixture(scope="module")
def cluster():
    """One that the engine finds itself connected to, and leaves running."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def cell(tmp_path, seed, *words, steps="2"):
    run = str(tmp_path / f"run{seed}")
    fit = ["--config", "textual_inversion", "--run", run, "--trainer.max_steps", steps, "--samples.count", "1"]
    fit += ["--samples.steps", "1", "--model.base", "tiny", "--checkpoint.every", "2"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\n")
    test = ["--run", run, "--images-per-prompt", "1", "--steps", "1", "--prompts", str(prompts)]
    return Cell("ti", "ball", seed, tmp_path / f"run{seed}", [*fit, *words], test)


def when(is_so, then):
    """Do something from another thread once something is so."""

    def watch():
        deadline = time.monotonic() + 120
        while not is_so() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
def test_the_table_is_that_of_the_local_engine_and_either_carries_on_with_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a photo of a {}\n")
    assert main(["compare", *SHORT, "--out", "here"]) == 0
    assert main(["compare", *SHORT, "--out", "there", "--engine", "ray"]) == 0
    assert "Ray: 1 node; a cell asks for 1 CPU.\n" in capsys.readouterr().out
    tables = [json.loads(Path(out, "table.json").read_text())["rows"] for out in ("here", "there")]
    for row in (row for rows in tables for row in rows):
        assert row["cells"] == row["batch"] == 2 and all(row.pop(key) > 0 for key in MEASURED)
    assert tables[0] == tables[1]
    for out, words in (("here", ["--engine", "ray"]), ("there", [])):
        assert main(["compare", *SHORT, "--out", out, *words]) == 0
        assert "2 cells, 2 of them done" in capsys.readouterr().out


def test_an_address_where_nobody_answers_is_told(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"--address 127.0.0.1:9: no Ray cluster of this version answers there \("):
        next(RayEngine(address="127.0.0.1:9").run_all([[cell(tmp_path, 0)]], tmp_path / "logs"))


@pytest.mark.slow
def test_a_killed_worker_is_begun_again_and_a_mistake_is_not(tmp_path, cluster):
    lost, wrong = cell(tmp_path, 0, steps="60"), cell(tmp_path, 1, "--model.lr", "-1")

    def kill():
        mine = psutil.Process().children(recursive=True)
        (worker,) = [process for process in mine if process.cmdline()[:1] == [f"ray::{lost.name}"]]
        worker.kill()

    when((lost.run / "checkpoints" / "last.ckpt").is_file, kill)
    with closing(RayEngine(tell=lambda line: None).run_all([[lost], [wrong]], tmp_path / "logs")) as ended:
        found = {one.seed: record for one, record in ended}
    assert -1 <= found[0]["dino"] <= 1 and found[0]["storage"] > 0
    assert "Resuming at step" in (tmp_path / "logs" / "ti-ball-0.txt").read_text()
    assert found[1] == {"error": "model.lr is -1.0; use a number above 0, or auto.", "kind": "failed"}
    assert (tmp_path / "logs" / "ti-ball-1.txt").read_text().count("UserError: model.lr is -1.0") == 1


@pytest.mark.slow
def test_a_batch_whose_worker_is_lost_is_tried_again_in_halves(tmp_path, cluster):
    """Where Ray has no retry left: it may be the memory."""
    batch = [cell(tmp_path, seed, steps="30") for seed in (0, 1)]

    def kill():
        mine = psutil.Process().children(recursive=True)
        name = f"ray::{batch[0].name} and 1 more"
        (worker,) = [process for process in mine if process.cmdline()[:1] == [name]]
        worker.kill()

    when((batch[1].run / "checkpoints" / "last.ckpt").is_file, kill)
    with closing(RayEngine(retries=0, tell=lambda line: None).run_all([batch], tmp_path / "logs")) as ended:
        found = {one.seed: record for one, record in ended}
    assert [found[seed]["batch"] for seed in (0, 1)] == [1, 1]
    for seed in (0, 1):
        assert "Resuming at step" in (tmp_path / "logs" / f"ti-ball-{seed}.txt").read_text()


@pytest.mark.slow
def test_who_goes_away_leaves_what_was_trained(tmp_path, cluster):
    one = cell(tmp_path, 0, "--checkpoint.every", "100000", "--trainer.log_every_n_steps", "1", steps="100000")
    log = one.run / "log.csv"
    trains = lambda: log.is_file() and len(log.read_text().splitlines()) > 2  # noqa: E731
    when(trains, lambda: signal.raise_signal(signal.SIGINT))  # as Ctrl-C does
    with (
        pytest.raises(KeyboardInterrupt),
        closing(RayEngine(tell=lambda line: None).run_all([[one]], tmp_path / "logs")) as ended,
    ):
        next(ended)
    assert (one.run / "checkpoints" / "last.ckpt").is_file()


def test_what_a_node_does_not_see_is_told_before_anything_runs(tmp_path, cluster):
    reads = [tmp_path, tmp_path / "elsewhere"]
    with pytest.raises(UserError, match=r"elsewhere: the Ray node \S+ does not see it; put it into a folder that all"):
        next(RayEngine(reads=reads).run_all([[cell(tmp_path, 0)]], tmp_path / "logs"))
    with pytest.raises(UserError, match="--threads 64: no node of the Ray cluster has as many CPUs; give fewer"):
        next(RayEngine(threads=64).run_all([[cell(tmp_path, 0)]], tmp_path / "logs"))
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cell_asks_for_as_much_of_the_smallest_gpu_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_nodes", lambda cpus: (["one", "two"], True))
    monkeypatch.setattr(engine, "_look", lambda nodes, has_gpus, root, reads: 16 * 2**30)
    told = []
    peaks = {("zoodip", 1): int(1.1 * 2**30), ("zoodip", 4): int(1.5 * 2**30), ("dreambooth", 1): 17 * 2**30}
    peaks |= {("unknown", 1): None}
    ask = RayEngine(threads=2, peak=lambda *kind: peaks[kind], tell=told.append)
    assert ask._asked(peaks, tmp_path / "logs") == {
        ("zoodip", 1): {"num_cpus": 2, "num_gpus": 0.1},  # (1.1 GiB + .5 GiB) / 16 GiB
        ("zoodip", 4): {"num_cpus": 2, "num_gpus": 0.125},
        ("dreambooth", 1): {"num_cpus": 2, "num_gpus": 1.0},
        ("unknown", 1): {"num_cpus": 2, "num_gpus": 1.0},
    }
    assert told == [
        "Ray: 2 nodes; a cell asks for 2 CPU and of a GPU of 16.00 GiB for 0.1 (zoodip), 0.125 (4 of zoodip together), "
        "1 (dreambooth), 1 (unknown)."
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray"], "--engine ray needs Ray, which is not installed: pip install 'mep-lightning[sweep]'."),
        (["--address", "auto"], "--address is for Ray; add --engine ray, or leave it out."),
        (["--retries", "2"], "--retries is for Ray; add --engine ray, or leave it out."),
        (["--retries", "-1"], "--retries is -1; use 0 or more."),
    ],
)
def test_mistakes_are_one_sentence_and_make_no_folder(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert main(["compare", "--methods", "zoodip", "--out", "out", *words]) == 2
    assert capsys.readouterr().err == f"mep compare: {message}\n"
    assert not Path("out").exists()
