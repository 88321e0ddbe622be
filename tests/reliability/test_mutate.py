"""A few damaged files: each is read, or told in a sentence; and a watch that would see what it is for."""

import os
import random
import subprocess
import sys

import pytest

from mep_lightning.errors import UserError
from reliability import mutate, mutations


@pytest.mark.slow
def test_sixty_damaged_files_are_read_or_told_in_a_sentence():
    wrong = []
    found = mutate.run(cases=60, seed=0, workers=1, told=wrong)
    assert wrong == []
    counts = {(one["case"], one["metric"]): one["value"] for one in found if one["unit"] == "count"}
    assert sum(counts.values()) == 60
    assert sum(value for (_, outcome), value in counts.items() if outcome == "told in a sentence") > 20


class Broken:
    """Fails as it is told."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def feed(self, *_: object) -> None:
        raise self.error


def test_an_exception_and_an_empty_sentence_are_findings(tmp_path):
    given = random.Random(0), tmp_path
    assert mutate._fed(Broken(KeyError("a")), "photos", *given)[0] == "another exception"
    assert mutate._fed(Broken(UserError("")), "photos", *given)[0] == "another exception"
    assert mutate._fed(Broken(UserError("a.png is empty")), "photos", *given) == (
        "told in a sentence",
        "a.png is empty",
    )


def test_writing_elsewhere_is_seen(tmp_path):
    """In a process of its own: such a watch stays."""
    code = (
        "import os, sys; from pathlib import Path; from reliability.mutate import _watch\n"
        f"os.chdir({str(tmp_path)!r}); Path('inside').mkdir(); seen = _watch(Path('inside').absolute())\n"
        "Path('inside/a').write_text('a'); Path('inside/a').read_text(); print(len(seen))\n"
        "Path('inside/../b').write_text('b'); os.system('true'); print(len(seen))"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_a_damage_is_a_pure_function_of_its_seed_and_leaves_what_it_was_given():
    tree = {"a": [1, {"b": 2}], "c": "d"}
    for damage in mutations.BYTES:
        assert damage(b"0123456789" * 9, random.Random(3)) == damage(b"0123456789" * 9, random.Random(3))
    damaged = [mutations.damage_tree(tree, random.Random(seed)) for seed in range(20)]
    assert tree == {"a": [1, {"b": 2}], "c": "d"}
    assert repr(damaged) == repr([mutations.damage_tree(tree, random.Random(seed)) for seed in range(20)])
    assert all(repr(one) != repr(tree) for one in damaged)
