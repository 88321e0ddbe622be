"""Sizes as people write them, what fits, what to take, and what a switch saves."""

import pytest

from mep_lightning.defaults import METHODS
from mep_lightning.errors import UserError
from mep_lightning.plan import Budget, Peak, Row, best, first_fit, parse_size, savings
from mep_lightning.plan.budget import PREFERENCE

GIB = 2**30


def row(method, precision, gib, checkpointing=False, offload="none"):
    return Row(method, "sd15", precision, 512, offload, checkpointing, {"step": Peak(int(gib * GIB), 0)})


ROWS = [
    row("zoodip", "int8", 1.2),
    row("zoodip", "int4", 0.8),
    row("zoodip", "int8", 0.4, offload="stream"),
    row("textual_inversion", "fp32", 5),
    row("textual_inversion", "fp32", 4, checkpointing=True),
    row("textual_inversion", "int8", 1.6),
]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("4GiB", 4 * GIB), ("1.5g", 15 * 10**8), ("800M", 8 * 10**8), (" 2 KiB ", 2048), ("100", 100)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "four", "-1GB", "4 PB", "4iB"])
def test_no_size(text):
    with pytest.raises(UserError, match="give a size such as 4GB"):
        parse_size(text)


def test_the_overhead_is_part_of_the_budget():
    assert Budget(int(1.7 * GIB) + 1, "cuda").fits(ROWS[0])
    assert not Budget(int(1.6 * GIB), "cuda").fits(ROWS[0])


@pytest.mark.parametrize(
    ("gib", "taken"),
    [
        (8, ("textual_inversion", "fp32", False)),
        (5, ("textual_inversion", "fp32", True)),
        (3, ("textual_inversion", "int8", False)),
        (1.9, ("zoodip", "int8", False)),
        (1.5, ("zoodip", "int4", False)),
        (1, ("zoodip", "int8", False)),
    ],
)
def test_the_method_to_take_first_and_then_the_most_bits_is_taken(gib, taken):
    found = best(ROWS, Budget(int(gib * GIB), "cuda"))
    assert (found.method, found.precision, found.checkpointing) == taken


@pytest.mark.parametrize(("gib", "stages"), [(9, 1), (3, 2), (1.5, 3), (0.7, 3)])
def test_no_more_is_rehearsed_than_it_takes(gib, stages):
    rows = [*ROWS, row("lora", "fp32", 8), row("gf_ti", "int8", 1)]
    asked = []

    def rehearsed(names):
        asked.append(names)
        return [one for one in rows if one.method in names]

    budget = Budget(int(gib * GIB), "cuda")
    taken, seen = first_fit(METHODS, rehearsed, budget)
    assert taken == best(rows, budget) and len(asked) == stages
    assert taken in seen if taken else len(seen) == len(rows)


def test_a_method_that_may_not_be_taken_is_not_rehearsed():
    asked = []
    assert first_fit(["peqa"], lambda names: asked.append(names) or [], Budget(GIB, "cuda")) == (None, [])
    assert asked == [["peqa"]]


def test_every_method_has_its_place():
    assert sorted(name for alike in PREFERENCE for name in alike) == sorted(METHODS)


def test_of_two_that_are_the_same_training_the_recipe_of_its_own_is_taken():
    def row(method, precision, checkpointing, gib):
        return Row(method, "sd15", precision, 512, "none", checkpointing, {"step": Peak(int(gib * GIB), 0)})

    rows = [
        row("textual_inversion", "fp32", False, 5.1),
        row("textual_inversion", "fp32", True, 4.1),
        row("textual_inversion_lite", "fp32", True, 4.1),
        row("textual_inversion", "int8", True, 1.1),
        row("textual_inversion_lite", "int8", True, 1.1),
        row("zoodip", "int8", False, 1.05),
    ]
    taken = [best(rows, Budget(int(size * GIB), "cuda")) for size in (6, 4.7, 1.7)]
    assert [(one.method, one.precision, one.checkpointing) for one in taken] == [
        ("textual_inversion", "fp32", False),
        ("textual_inversion_lite", "fp32", True),
        ("textual_inversion_lite", "int8", True),
    ]


def test_nothing_may_fit():
    assert best(ROWS, Budget(GIB // 2, "cuda")) is None


def test_a_switch_changes_one_thing_and_the_largest_saving_comes_first():
    found = list(savings(ROWS, ROWS[3]))
    assert [switch for switch, _ in found] == ["--model.precision int8", "--model.checkpointing true"]
    assert [size for _, size in found] == [int(5 * GIB) - int(1.6 * GIB), GIB]
    assert [switch for switch, _ in savings(ROWS, ROWS[0])] == ["--model.offload stream", "--model.precision int4"]
    assert list(savings(ROWS, ROWS[5])) == [("--config zoodip", int(1.6 * GIB) - int(1.2 * GIB))]


def test_a_row_says_how_to_ask_for_it():
    assert ROWS[2].settings == ["--model.precision", "int8", "--model.offload", "stream"]
    assert ROWS[4].settings == ["--model.precision", "fp32", "--model.checkpointing", "true"]
    assert str(ROWS[2]) == "zoodip in int8 (streamed)"
