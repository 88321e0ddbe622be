"""What is planned of a comparison's runs: rehearsed once, and again where anything that it depends on has changed."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from mep_lightning.bases.families import TINY_FOLDER
from mep_lightning.comparison import planned as module
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.comparison.planned import planned

MODEL = {"method": "lora", "precision": "int8", "seed": 0}


@pytest.fixture
def rehearsals(monkeypatch):
    """The methods, devices and sizes of batches of what was rehearsed; checkpointed runs have no plan."""
    asked = []

    def rehearsed(config, base, settings, device, subjects):
        asked.append((settings["model"]["method"], device, subjects))
        if settings["model"].get("checkpointing"):
            return None
        return SimpleNamespace(peak_bytes=10 * subjects, inference_peak_bytes=7)

    monkeypatch.setattr(module, "rehearsed", rehearsed)
    return asked


def cell(folder, method, seed=0, batch=1, callbacks=None, data=None, **model):
    config = folder.config(method, "dog", seed)
    config.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model": {**MODEL, "method": method, "seed": seed, **model}, "trainer": {"callbacks": callbacks}}
    config.write_text(yaml.safe_dump({**settings, "data": {"path": f"/{seed}", **(data or {})}}))
    return {"method": method, "subject": "dog", "seed": seed, "batch": batch, "device": "cpu"}


def test_a_method_is_rehearsed_once_as_long_as_nothing_changes(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    first = cell(folder, "lora")
    assert planned(folder, [first], "tiny") == {"lora": {"training_planned": 10, "inference_planned": 7}}
    others = [cell(folder, "lora", seed=1), cell(folder, "qlora")]
    assert planned(folder, [first, *others], "tiny").keys() == {"lora", "qlora"}
    assert rehearsals == [("lora", "cpu", 1), ("qlora", "cpu", 1)]
    assert planned(folder, others, "tiny").keys() == {"lora", "qlora"}  # a seed of its own is no other plan
    assert len(rehearsals) == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(precision="fp32"),
        dict(batch=4),
        dict(callbacks=[{"class_path": "HollowedActivations", "init_args": {"fraction": 0.5}}]),
        dict(data={"resolution": 32}),
        dict(data={"batch_size": 2}),
    ],
    ids=str,
)
def test_what_it_depends_on_is_rehearsed_again(tmp_path, rehearsals, change):
    folder = ComparisonFolder(tmp_path)
    planned(folder, [cell(folder, "lora")], "tiny")
    found = planned(folder, [cell(folder, "lora", **change)], "tiny")
    assert found["lora"]["training_planned"] == 10 * change.get("batch", 1)
    assert len(rehearsals) == 2


def test_so_it_is_on_another_device_with_other_code_and_on_another_base(tmp_path, rehearsals, monkeypatch):
    folder, base = ComparisonFolder(tmp_path / "folder"), tmp_path / "base"
    record = cell(folder, "lora")
    planned(folder, [record], "tiny")
    planned(folder, [{**record, "device": "NVIDIA H100"}], "tiny")
    assert rehearsals == [("lora", "cpu", 1), ("lora", "cuda", 1)]
    shutil.copytree(TINY_FOLDER, base, ignore=shutil.ignore_patterns("*.safetensors"))
    for _ in range(2):
        planned(folder, [record], str(base))
    assert len(rehearsals) == 3
    config = base / "unet" / "config.json"
    config.write_text(config.read_text().replace("64", "32"))
    planned(folder, [record], str(base))
    assert len(rehearsals) == 4
    monkeypatch.setattr(module, "_code", lambda: b"other")
    planned(folder, [record], str(base))
    assert len(rehearsals) == 5


def test_a_run_without_a_plan_is_tried_again(tmp_path, rehearsals):
    """What it lacked may be there by then: a package, or the hub."""
    folder = ComparisonFolder(tmp_path)
    for _ in range(2):
        assert planned(folder, [cell(folder, "lora", checkpointing=True)], "tiny") == {}
    assert len(rehearsals) == 2


def test_a_base_that_is_gone_leaves_a_table_without_plans(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    assert planned(folder, [cell(folder, "lora")], str(tmp_path / "gone")) == {}
    assert rehearsals == []


DAMAGED = ["", "[]", "3", "{", '{"lora": 3}', '{"lora": {"of": "x"}}', "\x00\xff", "[" * 100_000]
DAMAGED += ['{"lora": ["of", "training_planned", "inference_planned"]}']
DAMAGED += ['{"lora": {"of": "x", "training_planned": "many", "inference_planned": 1}}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_made_anew(tmp_path, rehearsals, content):
    folder = ComparisonFolder(tmp_path)
    record = cell(folder, "lora")
    folder.plans.write_text(content, encoding="latin-1")
    assert planned(folder, [record], "tiny") == planned(folder, [record], "tiny")
    assert len(rehearsals) == 1


def test_one_damaged_entry_leaves_the_others(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    records = [cell(folder, "lora"), cell(folder, "qlora")]
    found = planned(folder, records, "tiny")
    folder.plans.write_text(json.dumps(json.loads(folder.plans.read_text()) | {"lora": None}))
    assert planned(folder, records, "tiny") == found
    assert len(rehearsals) == 3


def test_a_folder_that_keeps_nothing_still_has_its_table(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    folder.plans.mkdir(parents=True)
    assert planned(folder, [cell(folder, "lora")], "tiny").keys() == {"lora"}


def test_cells_that_failed_or_left_no_settings_have_no_plan(tmp_path, rehearsals):
    folder = ComparisonFolder(tmp_path)
    failed = cell(folder, "lora") | {"error": "out of memory"}
    assert planned(folder, [failed, {"method": "zoodip", "subject": "dog", "seed": 0}], "tiny") == {}
    assert rehearsals == [] and not folder.plans.exists()
