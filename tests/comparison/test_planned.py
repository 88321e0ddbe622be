"""What is planned of a comparison's runs: rehearsed once, and again where anything that it depends on has changed."""

from types import SimpleNamespace

import pytest
import yaml

from mep_lightning.comparison import planned as module
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.planned import planned

MODEL = {"method": "lora", "precision": "int8", "seed": 0}


@pytest.fixture
def rehearsals(monkeypatch):
    """The names and sizes of batches of what was rehearsed; a method called `strange` has no plan."""
    asked = []

    def rehearsed(config, base, settings, device, subjects):
        asked.append((settings["model"]["method"], base, subjects))
        return SimpleNamespace(peak_bytes=10 * subjects, inference_peak_bytes=7) if base != "strange" else None

    monkeypatch.setattr(module, "rehearsed", rehearsed)
    return asked


def cell(folder, method, seed=0, batch=1, **model):
    config = folder.config(method, "dog", seed)
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump({"model": {**MODEL, "method": method, **model}, "data": {"path": f"/{seed}"}}))
    return {"method": method, "subject": "dog", "seed": seed, "batch": batch}


def test_a_method_is_rehearsed_once_as_long_as_nothing_changes(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    first = cell(folder, "lora")
    assert planned(folder, [first], "tiny") == {"lora": {"training_planned": 10, "inference_planned": 7}}
    others = [cell(folder, "lora", seed=1), cell(folder, "qlora")]
    assert planned(folder, [first, *others], "tiny").keys() == {"lora", "qlora"}
    assert rehearsals == [("lora", "tiny", 1), ("qlora", "tiny", 1)]
    assert planned(folder, others, "tiny").keys() == {"lora", "qlora"}  # a seed of its own is no other plan
    assert len(rehearsals) == 2


def test_what_it_depends_on_is_rehearsed_again(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    record = cell(folder, "lora")
    planned(folder, [record], "tiny")
    assert planned(folder, [{**record, "batch": 4}], "tiny")["lora"]["training_planned"] == 40
    planned(folder, [record], "other")
    cell(folder, "lora", precision="fp32")
    planned(folder, [record], "other")
    assert len(rehearsals) == 4


def test_that_there_is_no_plan_is_known_too(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    for _ in range(2):
        assert planned(folder, [cell(folder, "lora")], "strange") == {}
    assert len(rehearsals) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"lora": 3}', '{"lora": {"of": "x"}}', "\x00\xff"])
def test_a_damaged_file_is_made_anew(tmp_path, rehearsals, content):
    folder = ComparisonFolder(tmp_path)
    record = cell(folder, "lora")
    folder.plans.write_text(content, encoding="latin-1")
    assert planned(folder, [record], "tiny") == planned(folder, [record], "tiny")
    assert len(rehearsals) == 1


def test_cells_that_failed_or_left_no_settings_have_no_plan(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    failed = cell(folder, "lora") | {"error": "out of memory"}
    assert planned(folder, [failed, {"method": "zoodip", "subject": "dog", "seed": 0}], "tiny") == {}
    assert rehearsals == [] and not folder.plans.exists()
