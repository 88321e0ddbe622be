"""What the study of paths keeps of a learned token."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.studies import paths


def test_a_token_of_few_components_is_the_nearest_in_them(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(300, 128, generator=generator, dtype=torch.float64).cumsum(0)
    start = path[0] - 1
    module = SimpleNamespace(adapter=SimpleNamespace(theta=torch.nn.Parameter(path[-1].float()[None].clone())))
    learned = module.adapter.theta.detach().clone()
    monkeypatch.setattr(paths, "heldout_loss", lambda m, _: (m.adapter.theta - learned).norm().item())

    basis = torch.linalg.svd(path - start, full_matrices=False).Vh
    left = paths._truncated(module, None, start, basis)
    assert list(left) == [0, *paths.DIMS]
    assert left[0] == pytest.approx((path[-1] - start).norm().item(), rel=1e-5)
    assert all(left[more] < left[fewer] for fewer, more in zip(left, list(left)[1:], strict=False))
    assert left[128] < 1e-4 * left[0]
    _, vectors = torch.linalg.eigh((path - start).T @ (path - start))  # the same components from the covariance
    first = vectors[:, -8:]
    rest = path[-1] - start - first @ (first.T @ (path[-1] - start))
    assert left[8] == pytest.approx(rest.norm().item(), rel=1e-4)
    assert torch.equal(module.adapter.theta, learned)


def test_components_of_the_vocabulary_come_by_how_far_a_token_has_moved_along_them():
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(500, 16, generator=generator, dtype=torch.float64) * torch.arange(1, 17)
    covariance = torch.cov(words.T)
    components = torch.linalg.eigh(covariance).eigenvectors.T
    moved = 3 * components[2] - 5 * components[9] + 0.1 * components[15]
    basis = paths.most_moved(words, moved)
    assert torch.allclose(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-9)
    for found, expected in zip(basis, (9, 2, 15), strict=False):
        assert abs(found @ components[expected]).item() == pytest.approx(1)
    assert (moved - basis[:2].T @ (basis[:2] @ moved)).norm().item() == pytest.approx(0.1)
