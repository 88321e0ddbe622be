"""What libraries were measured to hold beside tensors is no more than a plan sets aside for them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mep_lightning import PersonalizationModule
from mep_lightning.bases import open_base
from mep_lightning.plan import Budget, Peak, Row, rehearse
from mep_lightning.plan.budget import overhead
from mep_lightning.plan.workspaces import WORKSPACES

MIB = 2**20
FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda" / "memory-sd15.json"
MEASURED = [row for row in json.loads(FIGURES.read_text())["rows"] if row["metric"].startswith("peak on cuda")]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["case"])
def test_no_recipe_took_more_than_its_plan_and_the_workspaces(row):
    assert row["value"] <= row["baseline"] + WORKSPACES


def test_only_a_gpus_libraries_hold_any():
    on_cpu, on_gpu = (
        rehearse(
            [PersonalizationModule("tiny")], dataclasses.replace(open_base("tiny"), device=torch.device(device)), 64
        )[0]
        for device in ("cpu", "cuda")
    )
    assert {peak.workspaces for peak in on_cpu.values()} == {0}
    assert {peak.workspaces for peak in on_gpu.values()} == {WORKSPACES}
    assert on_gpu["step"].needed == on_gpu["step"].total + WORKSPACES


def test_they_are_beside_tensors_and_within_the_budget():
    phases = {"step": Peak(900 * MIB, 0, workspaces=160 * MIB), "decode": Peak(800 * MIB, 0, workspaces=350 * MIB)}
    row = Row("zoodip", "sd15", "int8", 512, "none", False, phases)
    assert (row.peak_bytes, row.peak_phase) == (900 * MIB, "step")
    assert row.needed_bytes == 1150 * MIB and row.workspaces_bytes == 250 * MIB
    least = row.needed_bytes + overhead("cuda")
    assert Budget(least, "cuda").fits(row) and not Budget(least - 1, "cuda").fits(row)
