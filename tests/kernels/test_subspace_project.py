"""Projecting directions out of a gradient, in place."""

import pytest
import torch

from mep_lightning.kernels import subspace_project_

OP = torch.ops.mep_lightning.subspace_project_.default


def orthonormal(k: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, max(k, 1), dtype=torch.float64)).Q.T[:k].float().contiguous()


@pytest.mark.parametrize("k", [0, 1, 7, 12])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=str)
def test_what_is_left_is_orthogonal_to_the_basis_and_the_rest_is_untouched(k, shape):
    basis, grad = orthonormal(k, 12), torch.randn(shape)
    before = grad.clone()
    assert subspace_project_(grad, basis) is grad
    assert (basis @ grad.flatten()).abs().max() < 1e-6 if k else torch.equal(grad, before)
    complement = torch.eye(12) - basis.T @ basis
    torch.testing.assert_close(grad.flatten(), complement @ before.flatten(), rtol=1e-5, atol=1e-6)


def test_works_in_place_on_a_view_and_in_half_precision():
    basis, wide = orthonormal(5, 12), torch.randn(12, 2)
    untouched, view = wide[:, 1].clone(), wide[:, 0]
    subspace_project_(view, basis)
    assert (basis @ wide[:, 0]).abs().max() < 1e-6
    assert torch.equal(wide[:, 1], untouched)
    half = torch.randn(12, dtype=torch.bfloat16)
    expected = subspace_project_(half.float(), basis)
    assert subspace_project_(half, basis).dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("k", "d"), [(1, 2), (5, 40), (127, 768)])
def test_equals_the_formula_in_float64(k, d):
    basis, grad = orthonormal(k, d), torch.randn(d)
    p, g = basis.double(), grad.double()
    expected = g - torch.stack([row * (row @ g) for row in p]).sum(0)  # a direction at a time
    for project in (subspace_project_, subspace_project_.reference):
        torch.testing.assert_close(project(grad.clone(), basis).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [0, 5])
def test_opcheck(k):
    torch.library.opcheck(OP, (torch.randn(3, 4), orthonormal(k, 12)))


def test_compiles_in_one_graph():
    basis, grad = orthonormal(5, 12), torch.randn(12)
    compiled = torch.compile(lambda g: subspace_project_(g, basis) * 2, fullgraph=True, backend="aot_eager")
    expected = subspace_project_.reference(grad.clone(), basis) * 2
    torch.testing.assert_close(compiled(grad), expected)
    torch.testing.assert_close(grad, expected / 2)
