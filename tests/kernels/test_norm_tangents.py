"""Norms with their tangents: the definition against forward-mode AD, and ours against the definition."""

import sys

import pytest
import torch
from torch.func import jvp
from torch.nn import functional as F

from mep_lightning.kernels import group_norm_tangents, layer_norm_tangents

MODULE = sys.modules["mep_lightning.kernels.norm_tangents"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def values(*shape, dtype=torch.float64):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("parametrised", [True, False], ids=["weight and bias", "neither"])
def test_the_definitions_are_the_derivatives(parametrised):
    x = values(2, 6, 3, 5)
    weight, bias = values(6)[:2] if parametrised else (None, None)
    found = group_norm_tangents.reference(x, 3, weight, bias, 1e-5)
    for i in (1, 2):
        value, tangent = jvp(lambda y: F.group_norm(y, 3, weight, bias, 1e-5), (x[0],), (x[i],))
        torch.testing.assert_close((found[0], found[i]), (value, tangent))
    shape = (3, 5)
    weight, bias = values(*shape)[:2] if parametrised else (None, None)
    found = layer_norm_tangents.reference(x, shape, weight, bias, 1e-5)
    for i in (1, 2):
        value, tangent = jvp(lambda y: F.layer_norm(y, shape, weight, bias, 1e-5), (x[0],), (x[i],))
        torch.testing.assert_close((found[0], found[i]), (value, tangent))


@pytest.mark.parametrize("at_once", [2**19, 40], ids=["whole", "in blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_the_definition_in_float64(dtype, at_once, monkeypatch):
    monkeypatch.setitem(MODULE.AT_ONCE, "cpu", at_once)
    x, (weight, bias, _) = values(2, 6, 4, 5, dtype=dtype), values(6, dtype=dtype)
    pairs = [
        (group_norm_tangents(x, 3, weight, bias), group_norm_tangents.reference(x.double(), 3, weight, bias)),
        (group_norm_tangents(x[..., 0, 0], 3), group_norm_tangents.reference(x[..., 0, 0].double(), 3)),
        (layer_norm_tangents(x, [5]), layer_norm_tangents.reference(x.double(), [5])),
        (layer_norm_tangents(x.mT, [5, 4]), layer_norm_tangents.reference(x.mT.double(), [5, 4])),
    ]
    for ours, exact in pairs:
        assert ours.dtype == dtype and ours.shape == exact.shape
        for one, true in zip(ours, exact, strict=True):
            # of a group of two numbers next to nothing is left of a tangent
            assert (one - true).norm() <= 4 * torch.finfo(dtype).eps * max(true.norm(), 0.5 * exact.norm())


def test_the_memory_format_is_kept():
    x = values(2, 6, 4, 5)
    last = torch.stack([one.to(memory_format=torch.channels_last) for one in x]).permute(0, 1, 3, 4, 2)
    last = last.contiguous().permute(0, 1, 4, 2, 3)
    found = group_norm_tangents(last, 3)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, group_norm_tangents(x, 3))
