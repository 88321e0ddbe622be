"""Who is compared on: folders as the public sets have them, and the tiny world's own."""

import json

import pytest
from PIL import Image

from mep_lightning.comparison.subjects import chosen, embedded, found_in, photograph
from mep_lightning.errors import UserError


def folder(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.jpg")
    return root


def test_a_folders_name_says_what_it_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    found = found_in(folder(tmp_path, "dog2", "grey_sloth_plushie", "cat", "007"))
    assert {one.name: one.class_word for one in found} == {
        "dog2": "dog",
        "grey_sloth_plushie": "grey sloth plushie",
        "cat": "cat",
        "007": "object",
    }


@pytest.mark.parametrize("below", [True, False])
def test_dreambooths_file_says_so(tmp_path, below):
    inner = tmp_path / "dataset" if below else tmp_path
    folder(inner, "backpack_dog", "can")
    (inner / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nbackpack_dog,backpack\ncan,can\n\nPrompts\n\nObject Prompts\n"
    )
    assert {one.name: one.class_word for one in found_in(tmp_path)} == {"backpack_dog": "backpack", "can": "can"}


def test_a_file_of_ones_own_says_so_for_any_folders_name(tmp_path):
    folder(tmp_path, "rex", "Mr. Fluffy 2", ".thumbnails")
    (tmp_path / "prompts_and_classes.txt").write_text("rex,dog\nMr. Fluffy 2, teddy bear\n")
    (tmp_path / "links").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "links" / "._0.jpg")
    found = {one.name: one.class_word for one in found_in(tmp_path)}
    assert found == {"rex": "dog", "Mr. Fluffy 2": "teddy bear"}, "hidden ones are none"


def test_custom_concepts_file_says_so(tmp_path):
    folder(tmp_path, "decoritems_houseplant1")
    concepts = [{"class_prompt": "houseplant", "instance_data_dir": "./benchmark_dataset/decoritems_houseplant1"}]
    (tmp_path / "dataset.json").write_text(json.dumps(concepts))
    assert found_in(tmp_path)[0].class_word == "houseplant"
    (tmp_path / "dataset.json").write_text("[1]")
    with pytest.raises(UserError, match="dataset.json: not a list of instance_data_dir and class_prompt"):
        found_in(tmp_path)


def test_those_that_are_named_are_taken_in_that_order(tmp_path):
    subjects = found_in(folder(tmp_path, "a", "b", "c"))
    assert [one.name for one in chosen(subjects, ["c", "a"])] == ["c", "a"]
    for names, said in ((["d"], "--only d: there is no such subject; choose from a, b, c"), (["a", "b", "a"], "twice")):
        with pytest.raises(UserError, match=said):
            chosen(subjects, names)
    with pytest.raises(UserError, match="--only names none; choose from a, b, c"):
        chosen(subjects, [])


def test_the_tiny_worlds_photos_are_written(tmp_path):
    found = embedded(2, tmp_path)
    assert [one.class_word for one in found] == ["ball", "cube"] and not any(tmp_path.iterdir())
    photograph(found)
    assert all(len(list(one.photos.glob("*.png"))) == 5 for one in found)
    (found[0].photos / "0.png").write_bytes(b"kept")
    photograph(found)
    assert (found[0].photos / "0.png").read_bytes() == b"kept"
    with pytest.raises(UserError, match="--subjects 31: the tiny world has 1 to 30"):
        embedded(31, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"), [(False, "there is no such folder"), (True, "no folder in it holds photos")]
)
def test_a_folder_without_subjects_is_refused(tmp_path, make, message):
    if make:
        (tmp_path / "x" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        found_in(tmp_path / "x")
