"""Activations and products with their tangents, and the rows that their kernels walk along."""

import pytest
import torch
from torch.func import jvp
from torch.nn import functional as F

from mep_lightning.kernels import activation_tangents, product_tangents
from mep_lightning.kernels.pointwise_tangents import fuses
from mep_lightning.kernels.stacks import as_rows, room


def values(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("name", "function"), [("silu", F.silu), ("gelu", F.gelu)])
def test_an_activations_definition_is_its_derivative(name, function):
    x = 3 * values(4, 5)
    found = activation_tangents(x, name)
    for i in (1, 2):
        torch.testing.assert_close((found[0], found[i]), jvp(function, (x[0],), (x[i],)))


def test_a_products_definition_is_its_derivative():
    x, y = values(2, 4, 5).unbind(1)
    found = product_tangents(x, y)
    for i in (1, 2):
        torch.testing.assert_close((found[0], found[i]), jvp(torch.mul, (x[0], y[0]), (x[i], y[i])))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="relu is none of silu, gelu"):
        activation_tangents(values(2), "relu")


def test_nothing_is_fused_on_a_cpu():
    assert not fuses(values(4, 5).float())


def test_rows_are_views_in_the_order_of_memory():
    x = values(2, 4, 6)
    assert as_rows(x).shape == (3, 1, 48)
    half = x[..., 3:]
    assert as_rows(half).shape == (3, 8, 3) and as_rows(half).data_ptr() == half.data_ptr()
    assert as_rows(x[..., ::2]) is None and as_rows(x.mT) is None
    assert as_rows(values()).shape == (3, 1, 1)
    last = room(values(2, 4, 3, 5)[0].to(memory_format=torch.channels_last), 2)
    assert last.shape == (3, 2, 4, 3, 5) and last[0].is_contiguous(memory_format=torch.channels_last)
    assert as_rows(last).shape == (3, 1, 120) and as_rows(last).data_ptr() == last.data_ptr()
