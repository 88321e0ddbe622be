"""A LoRA linear for members at different points: the definition, peft's own layer, and PyTorch's modes."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.estimators import RandomGradientEstimator, SPSAEstimator
from mep_lightning.estimators.perturbation import perturb
from mep_lightning.kernels import int8_linear, perturbed_lora_linear, quantize_rows

OWN = "mep_lightning.kernels.perturbed_lora_linear"
OP = torch.ops.mep_lightning.perturbed_lora_linear.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROBES = [(0, 0.0), (0, 1.0), (2, -1.0)]


def layer(outputs=6, inputs=7, rank=3):
    generator = torch.Generator().manual_seed(0)
    q, scale = quantize_rows(torch.randn(outputs, inputs, generator=generator))
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return q, scale, torch.randn(outputs, generator=generator), a, b


def run(x, parts, probes=PROBES, function=perturbed_lora_linear, mu=0.1, seed=5, step=9):
    return function(x, *parts, 0.5, probes, mu, seed, step, (3, 4))


@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 7), (6, 5, 7), (3, 0, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(shape, dtype):
    x = torch.randn(shape).to(dtype)
    parts = layer()
    ours, theirs = run(x, parts), run(x, parts, function=perturbed_lora_linear.reference)
    assert ours.dtype == dtype and ours.shape == theirs.shape
    torch.testing.assert_close(
        ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("estimator", [RandomGradientEstimator(3, 0.1), SPSAEstimator(2, 0.1)], ids=["rge", "spsa"])
def test_members_stand_where_the_estimator_puts_them(estimator):
    q, scale, bias, a, b = layer()
    probes = estimator.probes
    x = torch.randn(len(probes), 4, 7)
    all_a = perturb(a, probes, 0.1, seed=5, step=9, param_id=3)
    all_b = perturb(b, probes, 0.1, seed=5, step=9, param_id=4)
    expected = torch.stack(
        [
            int8_linear(rows, q, scale, bias) + 0.5 * rows @ one_a.T @ one_b.T
            for rows, one_a, one_b in zip(x, all_a, all_b, strict=True)
        ]
    )
    torch.testing.assert_close(run(x, (q, scale, bias, a, b), probes), expected)


def test_without_a_sign_it_is_the_plain_lora_layer():
    q, scale, bias, a, b = layer()
    x = torch.randn(2, 4, 7)
    expected = int8_linear(x, q, scale, bias) + 0.5 * x @ a.T @ b.T
    torch.testing.assert_close(run(x, (q, scale, bias, a, b), [(0, 0.0), (7, 0.0)]), expected)


def test_a_small_step_survives_half_precision():
    """A factor of ones moved by so little would not move at all in bf16: the low-rank term is fp32."""
    q, scale = quantize_rows(torch.zeros(6, 7))
    parts, mu, probes = (q, scale, None, torch.ones(1, 7), torch.ones(6, 1)), 1e-4, [(0, 1.0), (1, 1.0)]
    x = torch.randn(2, 5, 7).bfloat16()
    exact = run(x.float(), parts, probes, mu=mu)
    assert (run(x, parts, probes, mu=mu).float() - exact).abs().max() <= 2**-8 * exact.abs().max()  # rounded once
    assert torch.equal((parts[3] + mu).bfloat16(), parts[3].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        for function in (perturbed_lora_linear, perturbed_lora_linear.reference):
            y = run(x, parts, probes, mu=mu, function=function)
            assert (y.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
            moved, still = (run(x, parts, at, mu=0.01, function=function) for at in (probes, [(0, 0.0)] * 2))
            assert not torch.equal(moved, still)


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="4 rows cannot be shared among 3 members"):
        run(torch.randn(4, 7), layer())


def test_a_derivative_is_refused_and_not_silently_zero():
    parts = layer()
    x = torch.randn(3, 7)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        run(x, [*parts[:3], parts[3].requires_grad_(), parts[4]])
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.func.jvp(lambda x: run(x, layer()), (x,), (x,))
    with torch.no_grad():
        run(x, parts)


def test_opcheck():
    parts, tail = layer(), (0.5, [0, 0, 2], [0.0, 1.0, -1.0], 0.1, 5, 9, 3, 4)
    for x in (torch.randn(3, 2, 7), torch.randn(2, 6, 7).transpose(0, 1), torch.randn(3, 7).bfloat16()):
        torch.library.opcheck(OP, (x, *parts, *tail))
    torch.library.opcheck(OP, (torch.randn(3, 7), *parts[:2], None, *parts[3:], *tail))


def test_works_under_fake_tensors():
    parts = layer()
    with FakeTensorMode() as mode:
        y = run(torch.randn(3, 2, 7).bfloat16(), [mode.from_tensor(part) for part in parts])
    assert (y.shape, y.dtype) == ((3, 2, 6), torch.bfloat16)


@pytest.mark.parametrize(("rank", "launched"), [(256, True), (257, False)])
def test_ranks_that_a_gpu_has_no_room_for_are_pytorchs(rank, launched, monkeypatch):
    triton = pytest.importorskip("mep_lightning.kernels.perturbed_lora_linear.triton")
    calls = []
    monkeypatch.setattr(sys.modules[OWN], "runs_triton", lambda x: True)
    monkeypatch.setattr(triton, "perturbed_lora_linear", lambda x, q, *_: calls.append(x) or x.new_zeros(3, len(q)))
    parts = layer(rank=rank)
    x = torch.randn(3, 7)
    ours = run(x, parts)
    assert bool(calls) is launched
    if not launched:
        torch.testing.assert_close(ours, run(x, parts, function=perturbed_lora_linear.reference))
