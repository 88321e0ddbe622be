"""The suites at real size, on the embedded base: an ordinary step that is ordinary, peaks beside their plan."""

import copy

import pytest
import torch

from benchmarks.performance import memory, methods, real_step
from benchmarks.performance.ordinary import (
    DequantizingConv2d,
    DequantizingLinear,
    OrdinaryStep,
    as_it_comes_,
    plainly_dequantizing_,
)
from mep_lightning.bases import load_base
from mep_lightning.bases.frugal import REPLACED, AttentionProcessor
from mep_lightning.quantization import QuantizedWeight

SHIPPED = "textual_inversion, as shipped"


def test_the_plain_layers_compute_what_ours_do():
    unet = load_base("tiny", "int8").unet
    plain = copy.deepcopy(unet)
    as_it_comes_(plain)
    plainly_dequantizing_(plain)
    assert not any(type(part) in REPLACED.values() for part in plain.modules())
    assert not any(isinstance(processor, AttentionProcessor) for processor in plain.attn_processors.values())
    assert plain.conv_in.weight.is_contiguous() and plain.mid_block.resnets[0].conv1.weight.is_contiguous()
    assert not any(isinstance(part, QuantizedWeight) for part in plain.modules())
    assert {DequantizingLinear, DequantizingConv2d} <= {type(part) for part in plain.modules()}
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([500]), torch.randn(2, 32, 128)
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-4)


def test_the_ordinary_step_moves_the_token_by_the_slopes_it_finds():
    torch.manual_seed(0)
    step = OrdinaryStep(load_base("tiny", "int8"), torch.rand(1, 3, 64, 64) * 2 - 1, mu=1e-2)
    before = step.token.detach().clone()
    losses = step()
    assert losses.shape == (3,) and losses.isfinite().all() and losses.std() > 0
    assert step.token.grad.norm() > 0
    assert not torch.equal(step.token, before)


def test_planned_and_measured_peaks_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(memory, "available_precisions", lambda: ["int8"])
    rows = list(memory.run("tiny", methods=("zoodip", "lora", "hollowed_net", "selective")))
    measured = {row["case"]: row for row in rows if row["metric"].startswith("peak on cpu")}
    cases = [f"tiny 64 px zoodip in int8 {phase}" for phase in ("encode", "step", "denoise", "decode")]
    cases += [
        f"tiny 64 px {name} in int8 {phase}"
        for name in ("lora", "hollowed_net")
        for phase in ("step", "denoise", "decode")
    ]
    cases += [f"tiny 64 px selective in int8 {phase}" for phase in ("step", "low step", "denoise")]
    for case in cases:
        assert abs(measured[case]["value"] / measured[case]["baseline"] - 1) < 0.1, case
    assert any("(streamed)" in row["case"] for row in rows)


def test_both_sides_are_timed_in_one_run():
    rows = real_step.run("tiny", rounds=1)
    timed = [row for row in rows if row["metric"] == "seconds a step"]
    ways = [f"{activations} activations" for activations in ("fp32", "bf16")]
    carried = [f"tangents, {way}" for way in (*ways, "int8 activations")]
    ordinary = [f"{way}, beside ordinary {precision}" for way in (*ways, *carried) for precision in ("fp32", "bf16")]
    finite = [f"{carried[0]}, beside differences, {ways[0]}"]
    finite += [f"{carried[1]}, beside differences, {way}" for way in (ways[1], ways[0])]
    finite += [f"{carried[2]}, beside differences, {ways[0]}"]
    assert [row["case"] for row in timed] == [f"tiny int8 n=2, {case}" for case in (*ordinary, *finite)]
    assert all(row["ratio"] > 0 and row["value"] > 0 for row in timed)
    shares = {row["case"]: row["value"] for row in rows if row["metric"] == "share of the ceiling"}
    assert list(shares) == [f"tiny int8 n=2, {way}" for way in ways]
    assert all(share > 0 for share in shares.values())


def test_every_method_is_timed_in_training_and_drawing(monkeypatch):
    kept = ("zoodip", "lora", methods.MERGED, "hollowed_net", "selective")
    monkeypatch.setattr(methods, "CASES", {name: methods.CASES[name] for name in kept})
    monkeypatch.setattr(methods, "AS_SHIPPED", {SHIPPED: methods.AS_SHIPPED[SHIPPED]})
    rows = list(methods.run("tiny", rounds=1))
    timed = {metric: [row["case"] for row in rows if metric in row["metric"]] for metric in ("training", "denoising")}
    branches = ["selective, high resolution", "selective, low resolution"]
    told = [f"tiny int8 {name}" for name in (*kept[:-1], *branches)]
    assert timed["training"] == [*told, f"tiny fp32 {SHIPPED}"]
    assert len(timed["denoising"]) == 5 and all(row["value"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_a_step_has_the_operations_of_its_forward_passes_less_what_is_shared():
    """SD1.5's U-Net is known to take .803 TFLOP at 512 px; text encoders add a little, the shared prefix saves 5 %."""
    assert 0.94 < real_step.flops("sd15") / (3 * 0.803e12) < 1.02
