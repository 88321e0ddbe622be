"""Attention with its tangents: the definition against forward-mode AD, whoever computes it against the definition."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp

from mep_lightning.kernels import attention, attention_tangents

MODULE = sys.modules["mep_lightning.kernels.attention_tangents"]
OP = torch.ops.mep_lightning.attention_tangents.default


def heads(queries=50, keys=40, width=8, dtype=torch.float32, tangents=2):
    """As an attention layer has them: heads beside one another in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1 + tangents, 2, n, 3, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).mul(2).to(dtype).transpose(2, 3) for shape in shapes]


@pytest.fixture(autouse=True, params=["block by block", "together"])
def way(request, monkeypatch):
    """Either of ours, the first in blocks of seven rows and a rest."""
    if request.param == "block by block":
        monkeypatch.setattr(MODULE, "BLOCK", 7 * 40)
        monkeypatch.setattr(MODULE, "FEW", 0)


def test_the_definition_is_the_derivative():
    q, k, v = heads(5, 6, dtype=torch.float64)
    value, *tangents = attention_tangents.reference(q, k, v)
    for i, tangent in enumerate(tangents, 1):
        primal, exact = jvp(attention.reference, (q[0], k[0], v[0]), (q[i], k[i], v[i]))
        torch.testing.assert_close(tangent, exact)
        torch.testing.assert_close(value, primal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [1, 50], ids=["one query", "50 queries"])
@pytest.mark.parametrize("tangents", [1, 3])
def test_equals_the_definition_in_float64(dtype, queries, tangents):
    q, k, v = heads(queries, dtype=dtype, tangents=tangents)
    ours, exact = attention_tangents(q, k, v), attention_tangents.reference(q.double(), k.double(), v.double())
    assert ours.dtype == dtype and ours.shape == exact.shape and ours.transpose(2, 3).is_contiguous()
    for one, true in zip(ours, exact, strict=True):
        assert (one - true).norm() <= 4 * torch.finfo(dtype).eps * true.norm() + 1e-12


def test_every_value_is_written(monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert attention_tangents(*heads()).isfinite().all()


def test_a_tangent_is_the_same_alone_and_among_others():
    q, k, v = heads(tangents=3)
    alone = attention_tangents(*(torch.stack([x[0], x[2]]) for x in (q, k, v)))
    torch.testing.assert_close(attention_tangents(q, k, v)[[0, 2]], alone, rtol=1e-5, atol=1e-5)


def test_nothing_that_moves_moves_nothing():
    q, k, v = heads()
    for x in (q, k, v):
        x[1:] = 0
    assert attention_tangents(q, k, v)[1:].count_nonzero() == 0


def test_opcheck_and_fakes():
    torch.library.opcheck(OP, tuple(heads()))
    with FakeTensorMode() as mode:
        y = attention_tangents(*(mode.from_tensor(x.bfloat16()) for x in heads()))
    assert (y.shape, y.dtype) == ((3, 2, 3, 50, 8), torch.bfloat16)
