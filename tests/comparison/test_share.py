"""How much of a GPU a cell asks for."""

from pathlib import Path

import pytest

from mep_lightning.commands.budget import recipe
from mep_lightning.commands.recipes import find_recipe
from mep_lightning.comparison import share
from mep_lightning.comparison.share import PARTS, SCORING, gpu_share, peak_of_cells
from mep_lightning.plan import plan
from mep_lightning.plan.budget import OVERHEAD

GIB = 2**30


@pytest.mark.parametrize(("peak", "total"), [(1_134_140_820, 80 * GIB), (GIB, 24 * GIB), (5 * GIB + 1, 11 * GIB)])
def test_cells_that_share_a_gpu_stay_below_its_memory(peak, total):
    share = gpu_share(peak, total)
    cells = int(1 / share)
    assert cells * (peak + OVERHEAD["cuda"]) <= total < (cells + 2) * (peak + OVERHEAD["cuda"])
    assert share * PARTS == pytest.approx(round(share * PARTS)), "Ray would refuse it, or round it down"


def test_a_gpu_is_not_shared_where_nothing_is_known_or_nothing_is_left():
    assert gpu_share(None, 80 * GIB) == gpu_share(80 * GIB, 80 * GIB) == 1


def test_the_peak_is_the_plans_with_the_settings_that_cells_are_given(monkeypatch):
    zoodip = find_recipe("zoodip")
    rows = {
        (row.precision, row.offload): row
        for row in plan({"zoodip": recipe("zoodip")}, "tiny", device="cuda", precisions=["int8", "fp32"], pictures=1)
    }
    for words, which in (
        ([], ("int8", "none")),
        (["--model.precision", "fp32"], ("fp32", "none")),
        (["--model.offload=stream"], ("int8", "stream")),
    ):
        row = rows[which]
        assert peak_of_cells(zoodip, "tiny", words) == (
            max(row.peak_bytes, row.inference_peak_bytes + SCORING) + row.workspaces_bytes
        )
    assert rows["int8", "none"].peak_bytes != rows["fp32", "none"].peak_bytes
    small, large = (peak_of_cells(find_recipe("lora"), "tiny", ["--data.resolution", side]) for side in ("64", "128"))
    assert small < large
    monkeypatch.setattr(share, "SCORING", 0)  # next to which all of tiny is little
    four, alone = peak_of_cells(zoodip, "tiny", [], together=4), rows["int8", "none"]
    assert four > alone.peak_bytes + 2.5 * alone.phases["step"].activations


def test_nothing_is_known_of_a_base_that_cannot_be_rehearsed():
    assert peak_of_cells(find_recipe("zoodip"), "nowhere", []) is None
    assert peak_of_cells(find_recipe("lora"), "tiny", [], together=2) is None, "no batch could be of such"


def test_the_formula_is_documented_as_it_is():
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    scoring, context = (f"{size / 2**20:.0f} MiB" for size in (SCORING, OVERHEAD["cuda"]))
    assert f"min(1, (max(training, drawing + {scoring}) + workspaces + {context}) / memory of the smallest GPU)" in text
    assert f"{scoring} for the networks that score pictures, {context} for CUDA's context" in text
