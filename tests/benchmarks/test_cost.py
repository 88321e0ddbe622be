"""What a million subjects take, by hand and against what a run sends."""

import json

import pytest
from safetensors.torch import save

from benchmarks.documents import cost
from benchmarks.documents.cost import DAY, HOUR, Cost, exchanged_bytes, of_a_step, of_methods, token_bytes
from benchmarks.documents.tables import results


def test_gpu_time_is_steps_times_seconds_and_is_shared_out():
    one = Cost(seconds=0.02, steps=30_000, subjects=10**6)
    assert one.minutes == pytest.approx(10)
    assert one.gpu_hours == pytest.approx(0.02 * 30_000 * 1e6 / HOUR)
    assert one.days(800) == pytest.approx(one.days(8) / 100) == pytest.approx(0.02 * 30_000 * 1e6 / 800 / DAY)


def test_a_token_is_its_vector_and_a_header():
    import torch

    assert 4 * 768 < len(save({"<sks>": torch.zeros(1, 768)})) <= token_bytes() < 4 * 768 + 500


def test_what_zo_ddp_sends_is_a_loss_a_member_and_a_little_more():
    """ZOODiP: 3 members, 30,000 steps, tau 128."""
    assert exchanged_bytes("zoodip") == 30_000 * (3 * 4 + 8) + 16 * (300 + 234)
    assert exchanged_bytes("zoodip_fast") == 4_500 * (5 * 4 + 8) + 16 * 45


def test_the_tables_are_those_of_the_measured_step():
    rows = json.loads(results("cuda/profile-sd15").read_text())["rows"]
    (step,) = [row["value"] for row in rows if (row["case"], row["metric"]) == (cost.STEP, "seconds a step")]
    lines = [line.strip("| ").split(" | ") for line in of_a_step(rows).splitlines() if line.startswith("| zoodip")]
    assert lines[0][1:4] == [f"{1e3 * step:.1f}", "30,000", f"{step * 30_000 / 60:.1f}"]
    fast = next(line for line in lines if line[0] == "zoodip_fast, 5 members as 1.67 times 3")
    assert fast[1:4] == [f"{1e3 * step * 5 / 3:.1f}", "4,500", f"{step * 5 / 3 * 4_500 / 60:.1f}"]


def test_methods_that_were_timed_have_a_line_and_others_none():
    rows = [
        {"case": f"sd15 int8 {case}", "metric": "seconds a training step", "value": 0.036}
        for case in ("zoodip_fast", "textual_inversion", "lora")
    ]
    lines = of_methods(rows).splitlines()[2:]
    assert lines == [
        "| zoodip_fast | 36.0 | 4,500 | 2.7 | 45,000 | 234 | 2.3 |",
        "| textual_inversion | 36.0 | 5,000 | 3.0 | 50,000 | 260 | 2.6 |",
    ]
