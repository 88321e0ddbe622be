"""Attention: near its definition in float64 whoever computes it, and differentiable where a derivative is asked for."""

import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mep_lightning.kernels import attention, products

MODULE = sys.modules["mep_lightning.kernels.attention"]


def heads(queries=50, keys=40, width=8, dtype=torch.float32):
    """As an attention layer has them: heads beside one another in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, keys, keys)
    return [torch.randn(2, n, 3, width, generator=generator).mul(2).to(dtype).transpose(1, 2) for n in shapes]


@pytest.fixture
def blockwise(monkeypatch):
    """Our own way, in blocks of seven rows and a rest."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    for module in (MODULE, products):
        monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(MODULE, "LEAST", 0)
    monkeypatch.setattr(MODULE, "BLOCK", 7 * 40)
    calls = []
    ours = MODULE._blockwise
    monkeypatch.setattr(MODULE, "_blockwise", lambda *a: calls.append(1) or ours(*a))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [1, 50], ids=["one query", "50 queries"])
def test_equals_the_definition_in_float64(blockwise, dtype, queries):
    q, k, v = heads(queries, dtype=dtype)
    ours, exact = attention(q, k, v), attention.reference(q.double(), k.double(), v.double())
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert (ours - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm() + 1e-14
    assert bool(blockwise) == (dtype in (torch.float32, torch.bfloat16))


def test_is_as_true_in_bf16_as_pytorchs_own(blockwise):
    q, k, v = heads(200, 300, 40, torch.bfloat16)
    exact = attention.reference(q.double(), k.double(), v.double())
    ours, theirs = ((y - exact).norm() for y in (attention(q, k, v), F.scaled_dot_product_attention(q, k, v)))
    assert ours < 1.5 * theirs


def test_every_value_is_written(blockwise, monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert attention(*heads()).isfinite().all()


def test_a_member_is_the_same_alone_and_among_others(blockwise):
    q, k, v = heads()
    assert torch.equal(attention(q, k, v)[1:], attention(q[1:], k[1:], v[1:]))


def test_gradients_are_those_of_the_definition(blockwise):
    inputs = [x.double().requires_grad_() for x in heads(5, 4)]
    assert torch.autograd.gradcheck(attention, inputs)
    narrow = [x.requires_grad_() for x in heads()]
    ours, theirs = (torch.autograd.grad(f(*narrow).sin().sum(), narrow) for f in (attention, attention.reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not blockwise


def test_compiles_in_one_graph(blockwise):
    q, k, v = heads()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


def test_a_tangent_is_not_silently_zero(blockwise):
    q, k, v = heads()
    tangent = torch.randn_like(q)
    found = []
    for function in (attention, attention.reference):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            found.append(forward_ad.unpack_dual(function(forward_ad.make_dual(q, tangent), k, v)).tangent)
    torch.testing.assert_close(*found)
