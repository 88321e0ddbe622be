"""The fidelity suite: its truth is true, and it tells good precisions from bad ones."""

import pytest
import torch

from benchmarks.performance import fidelity
from benchmarks.performance.fidelity import Path
from mep_lightning.kernels import int8_linear_w8a8
from mep_lightning.quantization import Int8Linear


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(fidelity, "TIMESTEPS", (300, 700))
    monkeypatch.setattr(fidelity, "MUS", (1e-3, 1e-2))


def test_half_precision_drowns_what_fp32_keeps(short):
    exact, half = (
        fidelity.errors(fidelity.load(Path("int8", dtype), "cpu"), directions=4)
        for dtype in (torch.float32, torch.half)
    )
    for mu in ("mu 0.001", "mu 0.01"):
        rounding, truncation, correlation = exact[mu]
        assert rounding < 0.01 and correlation > 0.98 and truncation < 0.3
        assert half[mu][0] > 10 * rounding
        assert half[mu][1] == pytest.approx(truncation, rel=0.05)  # it is the weights', not the arithmetic's
    assert exact["mu 0.01"][1] > exact["mu 0.001"][1] and exact["mu 0.01"][0] < exact["mu 0.001"][0]
    carried, wide = half[fidelity.CARRIED], exact[fidelity.CARRIED]
    assert wide[0] < 1e-4 and carried[0] < 0.005 and carried[2] > 0.999


@pytest.mark.parametrize(
    ("path", "most"),
    [(Path("bf16", torch.bfloat16), 0.03), (Path("int8", torch.bfloat16, w8a8=True), 0.1)],
    ids=str,
)
def test_tangents_stay_true_where_a_difference_drowns(short, path, most):
    found = fidelity.errors(fidelity.load(path, "cpu"), directions=4)
    rounding, truncation, correlation = found[fidelity.CARRIED]
    assert rounding < most and truncation == 0 and correlation > 0.99
    assert found["mu 0.01"][0] > 10 * rounding


def test_the_wide_base_has_the_weights_that_the_path_computes_with():
    base = fidelity.load(Path("int8", torch.float32), "cpu")
    wide = fidelity.in_float64(base)
    members = fidelity.encoder_row(wide, "ball")[None]
    with torch.no_grad():
        ours, exact = (fidelity.losses(side, members, 500) for side in (base, wide))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)
    assert {p.dtype for p in wide.unet.parameters()} == {torch.float64}


def test_int8_activations_are_what_w8a8_computes():
    base = fidelity.load(Path("int8", torch.float32, w8a8=True), "cpu")
    layer = next(layer for layer in base.unet.modules() if isinstance(layer, Int8Linear))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), int8_linear_w8a8(x, layer.weight, layer.scale, layer.bias))


def test_paths_are_named_by_what_they_compute_in():
    assert len({str(path) for path in fidelity.PATHS}) == len(fidelity.PATHS)
    assert str(Path("int8", torch.float16, w8a8=True)) == "int8, W8A8 linears, float16 activations"
