"""Values with tangents for tests, and the forward-mode AD that they are checked against."""

import torch
from torch.func import jvp

from mep_lightning.tangents import Dual

N = 3
"""Directions."""


def dual(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dual(torch.randn(1 + N, *shape, generator=generator, dtype=torch.float64))


def expected(function, *duals):
    """Value and tangents by `torch.func.jvp`, one direction after the other."""
    values = tuple(d.value.contiguous() for d in duals)  # group norm's own tangent does not bear channels last
    along = [jvp(function, values, tuple(d.tangents[i].contiguous() for d in duals)) for i in range(N)]
    return torch.stack([along[0][0], *(tangent for _, tangent in along)])


def check(function, *duals, **tolerances):
    with torch.no_grad():
        found = function(*duals)
    assert isinstance(found, Dual) and found.shape == found.stack.shape[1:]
    torch.testing.assert_close(found.stack, expected(function, *duals), **tolerances)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
