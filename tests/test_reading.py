"""Small text files: bounded in size, settings bounded in depth and growth, and nothing but a sentence for the rest."""

import os

import pytest
import yaml

from mep_lightning.cli import shortened
from mep_lightning.commands.recipes import read_recipe
from mep_lightning.errors import UserError
from mep_lightning.reading import LARGEST, load_yaml, read_json, read_text


def test_settings_are_read_as_yaml_does_with_aliases_and_merges():
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: 3}\nc: *a\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join([f'*{chr(i)}'] * 9)}]\n" for i in range(ord("a"), ord("i"))
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 5000, "lie too deep"),
        ("- " * 200 + "1", "lie too deep"),
        ("a: &a [*a]", "an alias holds itself"),
        (LAUGHS, "grows too large when its aliases are written out"),
        ("a: !!int x", "invalid literal"),
        ("a: 2020-99-99", "month must be in"),
        ("a: !!timestamp x", "a tag does not fit its value"),
        ("a: !!float ''", "a tag does not fit its value"),
        ("a: " + "9" * 10_000, "integer string conversion"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_settings_that_are_hard_on_a_reader_are_one_sentence(tmp_path, text, why):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_recipe(path)
    assert str(told.value).startswith(f"{path}:") and why in str(told.value) and "\n" not in str(told.value)


def test_a_file_beyond_all_measure_is_not_read(tmp_path):
    path = tmp_path / "captions.txt"
    with open(path, "wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match=r"captions.txt has 4 MiB, and no file of its kind has more than 4 MiB"):
        read_text(path)
    assert read_json(path) is None


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is no plain file"):
        read_recipe(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "1" + "0" * 10_000, "\ufffe"])
def test_json_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") is None


def test_a_sentence_that_repeats_a_long_setting_keeps_its_beginning_and_its_mend():
    told = shortened(f"mine.yaml: model.base is {'x' * 5000!r};\nuse tiny.")
    assert len(told) < 600 and told.startswith("mine.yaml: model.base is 'xx") and told.endswith("xx'; use tiny.")
    assert shortened("a.png is empty") == "a.png is empty"
