"""Subspace Gradient against a PCA written with scikit-learn, and its rhythm: wait for tau, refresh every tau, hold."""

import io

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mep_lightning.errors import UserError
from mep_lightning.estimators import SubspaceGradient
from mep_lightning.estimators.subspace import low_variance_basis


def walk(tau: int, d: int, seed: int = 0) -> Tensor:
    """A token's path, fp32: a drift along three directions, little in the others, features of all sizes. [tau, d]."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(tau, d, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    mixing[:, 3:] *= 0.01
    sizes = torch.logspace(-2, 1, d, dtype=torch.float64)
    return ((steps @ mixing.T).cumsum(0) * sizes + 5).float()


def sklearn_projector(path: Tensor, nu: float) -> tuple[np.ndarray, int]:
    """P'P and i*, from scikit-learn's scaler and PCA in float64."""
    z = StandardScaler().fit_transform(path.double().numpy())
    pca = PCA(svd_solver="full").fit(z)
    rank = int((pca.singular_values_ > 1e-9 * pca.singular_values_[0]).sum())
    share = np.cumsum(pca.explained_variance_) / pca.explained_variance_.sum()
    kept = int(np.argmax(share > 1 - nu)) + 1
    basis = pca.components_[kept:rank]
    return basis.T @ basis, kept


def filled(path: Tensor, nu: float = 1e-3) -> SubspaceGradient:
    sg = SubspaceGradient(tau=len(path), nu=nu)
    for theta in path:
        sg.observe(theta)
    return sg


@pytest.mark.parametrize(("tau", "d"), [(8, 24), (24, 8), (16, 16), (128, 96)])
@pytest.mark.parametrize("nu", [1e-3, 0.1, 0.5])
def test_projects_out_what_scikit_learns_pca_says(tau, d, nu):
    path = walk(tau, d)
    sg, (projector, kept) = filled(path, nu), sklearn_projector(path, nu)
    grad = torch.randn(d)
    expected = grad.double().numpy() - projector @ grad.double().numpy()
    assert sg.project_(grad) is grad
    np.testing.assert_allclose(grad.numpy(), expected, atol=2e-6)
    removed = round(projector.trace())
    assert removed > 0
    assert (sg.rank_kept, sg.dims_left) == (kept, d - removed)
    assert sg.basis.shape == (removed, d)


@pytest.mark.parametrize("d", [7, 20])
def test_the_basis_is_orthonormal_and_rank_counts_the_lost_degree_of_centring(d):
    basis, kept = low_variance_basis(walk(10, d), 0.05)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    assert kept + len(basis) == min(10 - 1, d)


def test_directions_outside_the_paths_span_are_kept():
    path = walk(6, 40)
    z = StandardScaler().fit_transform(path.double().numpy())
    null = np.linalg.svd(z)[2][5:]  # orthogonal to all six centred points
    grad = torch.from_numpy(null.T @ np.ones(len(null))).float()
    before = grad.clone()
    torch.testing.assert_close(filled(path, nu=1.0).project_(grad), before, rtol=1e-4, atol=1e-5)


def test_a_constant_feature_is_left_unscaled_and_never_touched():
    path = walk(12, 9).double()
    path[:, 4] = 0.1  # its float64 mean rounds, and with some ways to sum its std is 1e-17
    sg, (projector, kept) = filled(path, 0.1), sklearn_projector(path, 0.1)
    assert sg.rank_kept == kept
    np.testing.assert_allclose((sg.basis.T @ sg.basis).numpy(), projector, atol=1e-5)
    grad = torch.randn(9, dtype=torch.float64)
    before = grad[4].item()
    assert abs(sg.project_(grad)[4] - before) < 1e-12


def test_a_path_of_low_rank_projects_within_its_span_only():
    generator = torch.Generator().manual_seed(0)
    coordinates, span = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    path = coordinates.T @ span  # [16, 16] of rank 3; what is beyond is rounding of 1e-16
    basis, kept = low_variance_basis(path, 1.0)
    assert (kept, len(basis)) == (1, 2)
    assert filled(path, nu=1.0).dims_left == 14
    assert filled(path, nu=0.0).dims_left == 16


def test_a_path_that_never_moves_removes_nothing():
    sg, grad = filled(torch.full((5, 4), 0.3)), torch.randn(4)
    before = grad.clone()
    assert torch.equal(sg.project_(grad), before)
    assert (sg.rank_kept, sg.dims_left) == (0, 4)


@pytest.mark.parametrize(("nu", "removed"), [(0.0, 0), (1.0, 6)])
def test_the_ends_of_nu(nu, removed):
    sg = filled(walk(8, 20), nu)
    assert sg.basis.shape[0] == removed  # rank 7: nothing, or all but the first component
    assert sg.rank_kept == 7 - removed


def test_identity_until_tau_seen_then_refreshed_every_tau_and_held():
    tau, d = 4, 10
    path, sg, grad = walk(3 * tau + 1, d), SubspaceGradient(tau=tau, nu=0.1), torch.randn(d)
    assert sg.dims_left is None
    assert torch.equal(sg.project_(grad.clone()), grad)
    projected = []
    for theta in path:
        sg.observe(theta)
        projected.append(sg.project_(grad.clone()))
    for k, now in enumerate(projected, start=1):  # k values seen
        if k < tau:
            assert torch.equal(now, grad)
        elif k % tau:
            assert torch.equal(now, projected[k - 2])
        else:
            assert not torch.allclose(now, projected[k - 2])
            expected, _ = sklearn_projector(path[k - tau : k], 0.1)  # the last tau values and no others
            np.testing.assert_allclose(now.numpy(), grad.numpy() - expected @ grad.numpy(), atol=2e-6)


@pytest.mark.parametrize("stop", [0, 3, 4, 6, 8])
def test_state_dict_round_trip_is_bitwise(stop):
    path, tau = walk(13, 10), 4

    def run(sg: SubspaceGradient, points: Tensor) -> list[Tensor]:
        grads = []
        for theta in points:
            grads.append(sg.project_(torch.sin(torch.arange(10.0) + 7 * theta)))
            sg.observe(theta)
        return grads

    through = run(SubspaceGradient(tau, 0.1), path)[stop:]
    first, second = SubspaceGradient(tau, 0.1), SubspaceGradient(tau, 0.1)
    run(first, path[:stop])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.dims_left, second.rank_kept) == (first.dims_left, first.rank_kept)
    assert all(torch.equal(a, b) for a, b in zip(run(second, path[stop:]), through, strict=True))


def test_a_saved_state_does_not_change_as_the_run_goes_on():
    sg = filled(walk(4, 6))
    state = sg.state_dict()
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    for theta in walk(4, 6, seed=1):
        sg.observe(theta)
    assert torch.equal(state["path"], before["path"])
    assert torch.equal(state["basis"], before["basis"])


@pytest.mark.parametrize("other", [SubspaceGradient(tau=5, nu=1e-3), SubspaceGradient(tau=4, nu=1e-2)])
def test_a_checkpoint_of_other_settings_is_refused(other):
    with pytest.raises(UserError, match=r"has (tau|nu)=.*, this one (tau|nu)="):
        other.load_state_dict(filled(walk(4, 6)).state_dict())


def test_several_vectors_count_as_one_point():
    path = walk(8, 12)
    flat, shaped = filled(path, 0.1), SubspaceGradient(8, 0.1)
    for theta in path:
        shaped.observe(torch.nn.Parameter(theta.view(2, 6)))
    grad = torch.randn(12)
    assert torch.equal(shaped.project_(grad.clone().view(2, 6)).flatten(), flat.project_(grad))
    assert shaped.dims_left == flat.dims_left


def test_theta_may_go_on_changing_in_place():
    path, theta, sg = walk(6, 8), torch.zeros(8), SubspaceGradient(6, 0.1)
    for point in path:
        theta.copy_(point)
        sg.observe(theta)
    assert torch.equal(sg.basis, filled(path, 0.1).basis)


@pytest.mark.parametrize("kwargs", [{"tau": 1}, {"nu": -0.1}, {"nu": 1.5}], ids=str)
def test_impossible_settings_are_refused_by_name(kwargs):
    (name,) = kwargs
    with pytest.raises(UserError, match=rf"SubspaceGradient\.{name} is"):
        SubspaceGradient(**kwargs)


def test_a_run_that_diverged_says_so():
    sg = SubspaceGradient(tau=2)
    sg.observe(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="no longer finite"):
        sg.observe(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kwargs", [{"tau": "auto"}, {"nu": "auto"}], ids=str)
def test_auto_says_what_to_do(kwargs):
    with pytest.raises(UserError, match="tau or nu is 'auto' outside a module; set them, such as 128 and 1e-3"):
        SubspaceGradient(**kwargs).observe(torch.zeros(3))
