"""A comparison's folder: whose it is, and that no record is lost."""

import pytest

from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.errors import UserError

WHAT = {"base": "tiny", "max_steps": None}


@pytest.fixture
def folder(tmp_path):
    made = ComparisonFolder(tmp_path / "out")
    made.claim(WHAT)
    return made


def record(seed, **more):
    return {"method": "a", "subject": "ball", "seed": seed, **more}


def test_the_last_record_of_a_cell_counts(folder):
    for one in (record(0, error="x"), record(1, dino=0.5), record(0, dino=0.25)):
        folder.keep(one)
    assert folder.records() == {("a", "ball", 0): record(0, dino=0.25), ("a", "ball", 1): record(1, dino=0.5)}


def test_half_a_line_costs_its_own_cell_alone(folder):
    folder.keep(record(0, dino=0.5))
    with open(folder.cells, "a") as file:
        file.write('{"method": "a", "subj')
    folder.keep(record(2, dino=0.5))
    assert {key[2] for key in folder.records()} == {0, 2}


def test_another_comparison_is_refused(folder):
    folder.claim(WHAT)
    with pytest.raises(UserError, match="holds a comparison with max_steps None, not 5: give another folder"):
        folder.claim(WHAT | {"max_steps": 5})
    folder.described.write_text("{")
    with pytest.raises(UserError, match="comparison.json is damaged"):
        folder.claim(WHAT)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other things than a comparison: give a new folder"):
        ComparisonFolder(tmp_path).claim(WHAT)


def test_a_folder_in_which_a_kill_left_half_a_file_or_a_lock_is_new(tmp_path):
    folder = ComparisonFolder(tmp_path)
    for name in (".tmp-1-comparison.json", ".lock"):
        (tmp_path / name).touch()
    with folder.alone():
        folder.claim(WHAT)
    folder.claim(WHAT)


def test_only_one_at_a_time_runs_its_cells(folder):
    with folder.alone():
        again = ComparisonFolder(folder.root)
        with (
            pytest.raises(UserError, match="another `mep compare` is at work there; wait until it is done"),
            again.alone(),
        ):
            pass
    with folder.alone():
        pass


def test_a_file_system_without_locks_is_no_obstacle(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with folder.alone():
        pass


def test_what_a_method_is_trained_with_stays_once_it_has_cells(folder):
    first = {"a": {"model.lr": 1e-3, "model.betas": (0.9, 0.999)}, "b": {"model.lr": 1.0}}
    folder.settle(first, {})
    made_ahead = folder.run("a", "ball", 0) / "activations"
    made_ahead.mkdir(parents=True)
    folder.settle({"a": {"model.lr": 1e-3}}, {})
    assert made_ahead.is_dir()
    folder.settle({"a": {"model.lr": 2e-3}}, {})
    assert not made_ahead.exists(), "of other settings"
    folder.keep(record(0, error="x"))
    folder.settle({"a": {"model.lr": 1e-3}}, {})  # nothing has come of it yet
    folder.keep(record(0, dino=0.5))
    folder.settle({"a": {"model.lr": 1e-3, "model.younger": 4}, "c": {}}, {})
    with pytest.raises(
        UserError, match=r"--methods a: the cells of it in .* have model.lr 0.001, not 0.002: give another"
    ):
        folder.settle({"a": {"model.lr": 2e-3}}, {})
    half = folder.run("b", "ball", 0) / "checkpoints" / "last.ckpt"
    half.parent.mkdir(parents=True)
    half.touch()
    with pytest.raises(UserError, match="have model.lr 1.0, not 2.0"):
        folder.settle({"b": {"model.lr": 2.0}}, {})
    folder.settings.write_text("[")
    folder.settle({"b": {"model.lr": 2.0}}, {})


def test_so_does_what_a_subject_is(folder):
    folder.settle({}, {"rex": "rex", "ball": "ball", "half-1": "half"})
    folder.settle({}, {"rex": "dog"})
    folder.keep(record(0, dino=0.5))
    half = folder.run("b", "half-1", 3) / "checkpoints" / "last.ckpt"
    half.parent.mkdir(parents=True)
    half.touch()
    for name, word in (("ball", "ball"), ("half-1", "half")):
        with pytest.raises(UserError, match=f"the cells of {name} in .* were trained as '{word}', not as 'toy'"):
            folder.settle({}, {name: "toy"})
    folder.settle({}, {"rex": "cat", "ball": "ball"})


@pytest.mark.parametrize("left", ["activations/a", "prior/0.png", "cell.json"])
def test_what_was_made_ahead_or_never_heard_of_another_class_word_is_gone(folder, left):
    folder.settle({}, {"dog": "dog", "dog-1": "dog"})
    made = {name: folder.run("a", name, 0) / left for name in ("dog", "dog-1")}
    for path in made.values():
        path.parent.mkdir(parents=True)
        path.touch()
    folder.settle({}, {"dog": "dog", "dog-1": "dog"})
    assert all(path.exists() for path in made.values())
    folder.settle({}, {"dog": "puppy", "dog-1": "dog"})
    assert not folder.run("a", "dog", 0).exists() and made["dog-1"].exists()


def test_a_path_may_be_said_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    folder = ComparisonFolder(tmp_path / "out")
    folder.claim({"base": "sd15"})  # as folders have it that are older
    folder.claim({"base": str((tmp_path / "sd15").resolve())})
    with pytest.raises(UserError, match="a comparison with base 'sd15', not '/elsewhere'"):
        folder.claim({"base": "/elsewhere"})
