"""Cells that train in batches: who trains with whom, what each is charged, and that one's failure is its own."""

import json
from dataclasses import replace

import pytest
import torch

from mep_lightning.commands import fit, test, together
from mep_lightning.comparison import cells
from mep_lightning.comparison.cells import Cell, Interrupted, batches
from mep_lightning.errors import TooLargeError, UserError
from mep_lightning.phases import phase
from mep_lightning.run_folder import RunFolder, held


def cell(root, method, subject, seed=0):
    run = root / method / f"{subject}-{seed}"
    return Cell(method, subject, seed, run, ["--run", str(run)], ["--run", str(run)])


def test_cells_of_a_method_and_a_seed_are_batched_and_a_round_of_methods_comes_early(tmp_path):
    every = [cell(tmp_path, m, s, seed) for seed in (0, 1) for s in "abc" for m in ("token", "lora")]
    found = batches(every, {"token": 2})
    names = [("".join(one.subject for one in batch), batch[0].method, batch[0].seed) for batch in found]
    first = [("ab", "token", 0), ("a", "lora", 0), ("b", "lora", 0), ("c", "token", 0), ("c", "lora", 0)]
    assert names == first + [(subjects, method, 1) for subjects, method, _ in first]
    assert {one.key for batch in found for one in batch} == {one.key for one in every}
    assert [len(batch) for batch in batches(every[::2], {"token": 8})] == [3, 3]
    assert batches(every, {}) == [[one] for one in every]


class Commands:
    """Stands in for the training and scoring of cells, in no time.

    Attributes:
        fails: subject -> what its training, and that of any batch with it, ends with.
        most: subjects that fit into memory.
        trained: the subjects of every training that was begun.
    """

    def __init__(self, monkeypatch):
        self.fails, self.most, self.trained, self.scores = {}, 9, [], True
        monkeypatch.setattr(cells, "rehearse", lambda: None)
        monkeypatch.setattr(fit, "run", lambda line: self.train([line]))
        monkeypatch.setattr(together, "train", self.train)
        monkeypatch.setattr(test, "run", self.score)

    def train(self, lines):
        runs = [RunFolder(line[line.index("--run") + 1]) for line in lines]
        names = "".join(run.root.name[0] for run in runs)
        words = [word.removeprefix("--") for word in ("--resume", "--no-plan") if word in lines[0]]
        self.trained.append(" ".join([*words, names]))
        if self.ends(runs[0]):
            return 0
        for name in names:
            if name in self.fails:
                raise self.fails[name]
        if len(names) > self.most:
            raise torch.OutOfMemoryError
        for _ in range(3):
            with phase("step"):
                pass
        for run in runs:
            run.adapter.mkdir(parents=True, exist_ok=True)
            (run.adapter / "learned_embeds.safetensors").write_bytes(b"x" * 700)
            memory = {"phases": {"step": {"peak_bytes": 100 * len(runs)}, "sample": {"peak_bytes": 7}}}
            run.memory_json.write_text(json.dumps(memory | ({"subjects": len(runs)} if len(runs) > 1 else {})))
        return 0

    @staticmethod
    def ends(run):
        """Whether nothing is left to train."""
        return run.last_checkpoint.is_file() and run.adapter.is_dir()

    def score(self, line):
        if not self.scores:
            raise UserError("--clip is none.")
        RunFolder(line[1]).metrics.write_text(json.dumps(dict.fromkeys(cells.SCORES, 0.5)))


@pytest.fixture
def commands(monkeypatch):
    return Commands(monkeypatch)


def records(batch):
    return {one.subject: record for one, record in cells.run(batch)}


def test_each_cell_of_a_batch_is_charged_its_share(tmp_path, commands, monkeypatch):
    now = iter(range(0, 10**6, 60))  # a minute between any two looks at the clock
    monkeypatch.setattr("mep_lightning.phases.time.monotonic", lambda: float(next(now)))
    found = records([cell(tmp_path, "token", name) for name in "abc"])
    assert commands.trained == ["abc"] and set(found) == set("abc")
    for record in found.values():
        assert record["batch"] == 3 and record["training_bytes"] == 300 and record["inference_bytes"] == 7
        assert record["minutes"] == 7 / 3  # two looks a step, and the last
        assert record["steps"] == 3 and record["steps_per_second"] == pytest.approx(3 * 2 / (4 * 60))
        assert record["storage"] == 700
    (alone,) = records([cell(tmp_path, "lora", "a")]).values()
    assert (alone["batch"], alone["training_bytes"], alone["minutes"]) == (1, 100, 7)


def test_one_that_fails_leaves_the_others_what_they_would_have(tmp_path, commands, capsys):
    commands.fails = {"c": UserError("c has no photos.")}
    found = records([cell(tmp_path, "token", name) for name in "abcde"])
    assert found["c"] == {"error": "c has no photos.", "kind": "failed"}
    assert {name: found[name]["batch"] for name in "abde"} == {"a": 2, "b": 2, "d": 2, "e": 2}
    assert commands.trained == ["abcde", "abc", "ab", "c", "de"]
    assert "5 cells cannot train together (c has no photos.): their halves are tried." in capsys.readouterr().out


def test_where_memory_runs_out_fewer_train_together_and_it_is_told(tmp_path, commands):
    commands.most = 2
    found = records([cell(tmp_path, "token", name) for name in "abcde"])
    assert {name: record["batch"] for name, record in found.items()} == {"a": 2, "b": 2, "c": 1, "d": 2, "e": 2}
    commands.most = 0
    (record,) = records([cell(tmp_path, "token", "f")]).values()
    assert record["kind"] == "memory"


def test_what_is_done_is_not_trained_again_and_who_is_ahead_goes_on_apart(tmp_path, commands):
    names = "abcdef"
    every = {name: cell(tmp_path, "token", name) for name in names}
    every["a"].run.mkdir(parents=True)
    (every["a"].run / cells.RECORD).write_text('{"dino": 0.25}')
    for name, step in (("c", 3), ("e", 3), ("f", 5)):
        run = RunFolder(every[name].run)
        run.checkpoints.mkdir(parents=True)
        torch.save(checkpoint(step), run.last_checkpoint)
    found = records(list(every.values()))
    assert commands.trained == ["bd", "resume ce", "resume f"]
    assert found["a"] == {"dino": 0.25}
    assert found["b"]["minutes"] > 0 and found["b"]["batch"] == 2
    assert found["c"]["minutes"] is found["c"]["steps"] is None and found["c"]["steps_per_second"] > 0
    assert all((every[name].run / cells.RECORD).is_file() for name in names)
    assert records(list(every.values())) == found and len(commands.trained) == 3


def test_what_the_training_took_is_kept_for_when_the_scoring_is_tried_again(tmp_path, commands):
    one, commands.scores = cell(tmp_path, "token", "a"), False
    assert records([one])["a"] == {"error": "--clip is none.", "kind": "failed"}
    run = RunFolder(one.run)
    run.checkpoints.mkdir()
    torch.save(checkpoint(3), run.last_checkpoint)
    other = cell(tmp_path, "token", "b")
    assert records([other])["b"]["kind"] == "failed"
    run = RunFolder(other.run)
    run.checkpoints.mkdir()
    torch.save(checkpoint(3), run.last_checkpoint)
    took = [json.loads((each.run / cells.TRAINED).read_text())["minutes"] for each in (one, other)]
    commands.scores = True
    found = records([one, other])
    assert commands.trained == ["a", "b", "resume ab"]
    assert [found[name]["steps"] for name in "ab"] == [3, 3]
    assert [found[name]["minutes"] for name in "ab"] == took and took[0] != took[1]


@pytest.mark.parametrize("made", ["activations", "prior"])
def test_what_is_made_ahead_of_the_first_step_is_gone_on_with(tmp_path, commands, made):
    begun, other = (cell(tmp_path, "hollowed_net", name) for name in "ab")
    for one in (begun, other):
        (one.run / made).mkdir(parents=True)
    RunFolder(begun.run).config.write_text("model: {}")
    for one in (begun, other):
        records([one])
    assert commands.trained == ["resume a", "b"]
    assert (begun.run / made).is_dir() and not (other.run / made).exists()


def test_a_cell_that_another_process_still_trains_is_left_to_it(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(cells, "PATIENCE", 0.1)
    one = cell(tmp_path, "token", "a")
    with held(one.run, ""):
        RunFolder(one.run).log.touch()
        told = f"another process still trains in {one.run}: end it, and use --retry."
        assert records([one])["a"] == {"error": told, "kind": "failed"}
        assert RunFolder(one.run).log.is_file() and commands.trained == []
    assert "error" not in records([one])["a"] and commands.trained == ["a"]


def test_what_would_not_fit_is_told_as_memory_and_a_resumed_cell_may_try_it_too(tmp_path, commands):
    commands.fails = {"a": TooLargeError("this run would take 9 GiB.")}
    assert records([cell(tmp_path, "token", "a")])["a"]["kind"] == "memory"
    one = cell(tmp_path, "token", "b")
    run = RunFolder(one.run)
    run.checkpoints.mkdir(parents=True)
    torch.save(checkpoint(3), run.last_checkpoint)
    records([replace(one, fit=[*one.fit, "--no-plan", "--samples.steps", "1"])])
    assert commands.trained == ["a", "resume no-plan b"]


def test_a_signal_is_no_failure(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(together, "train", lambda lines: 143)
    with pytest.raises(Interrupted):
        records([cell(tmp_path, "token", name) for name in "ab"])
    assert commands.trained == []


def checkpoint(step):
    """The least that `read_checkpoint` takes for one."""
    kept = {"state": {}, "param_groups": []}
    return {
        "global_step": step,
        "state_dict": {},
        "loops": {"fit_loop": {}},
        "lr_schedulers": [],
        "pytorch-lightning_version": "",
        "optimizer_states": [kept],
    }
