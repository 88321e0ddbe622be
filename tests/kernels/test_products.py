"""fp32 products on a CPU: the same as PyTorch's own, whoever computes them, and never behind a derivative's back."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from mep_lightning.kernels import products


@pytest.fixture(params=[True, False], ids=["oneDNN", "PyTorch"])
def chosen(request, monkeypatch):
    if request.param and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (5, 3, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_a_float64_product(chosen, shape, dtype):
    x, weight, bias = torch.randn(shape), torch.randn(6, 7), torch.randn(6)
    for b in (None, bias.to(dtype)):
        y = products.linear(x.to(dtype), weight.to(dtype), b)
        exact = F.linear(x.to(dtype).double(), weight.to(dtype).double(), None if b is None else b.double())
        assert y.dtype == dtype and y.shape == exact.shape
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), exact, rtol=8 * unit, atol=4 * unit)


def test_takes_views(chosen):
    x, weight = torch.randn(4, 7, 5).transpose(1, 2), torch.randn(7, 6).T
    torch.testing.assert_close(products.linear(x, weight), x @ weight.T)


def test_gradients_flow(chosen):
    x, weight = torch.randn(4, 7, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(x, weight).sin().sum(), (x, weight)) for f in (products.linear, F.linear))
    torch.testing.assert_close(ours, theirs)


def test_compiles_in_one_graph():
    x, weight = torch.randn(4, 7), torch.randn(6, 7)
    compiled = torch.compile(products.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), x @ weight.T)


def test_a_tangent_is_not_silently_zero(chosen):
    x, tangent, weight = torch.randn(4, 7), torch.randn(4, 7), torch.randn(6, 7)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(products.linear(forward_ad.make_dual(x, tangent), weight))
    torch.testing.assert_close(y.tangent, tangent @ weight.T)


@pytest.mark.parametrize(
    ("text", "intel"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_intels_own_processors_keep_mkl(tmp_path, monkeypatch, text, intel):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products.prefers_onednn.cache_clear()
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    assert products.prefers_onednn() == (has_both and not intel)
    products.prefers_onednn.cache_clear()
