"""What the study of paths keeps of a learned token."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.studies import paths


@pytest.mark.parametrize("about", ["start", "mean"])
def test_a_token_of_few_components_is_the_nearest_in_them(monkeypatch, about):
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(300, 128, generator=generator, dtype=torch.float64).cumsum(0)
    module = SimpleNamespace(adapter=SimpleNamespace(theta=torch.nn.Parameter(path[-1].float()[None].clone())))
    learned = module.adapter.theta.detach().clone()
    monkeypatch.setattr(paths, "heldout_loss", lambda m, _: (m.adapter.theta - learned).norm().item())

    centre = path[0] if about == "start" else path.mean(0)
    left = paths._truncated(module, None, path, centre)
    assert list(left) == [0, *paths.DIMS]
    assert left[0] == pytest.approx((path[-1] - centre).norm().item(), rel=1e-5)
    assert all(left[more] < left[fewer] for fewer, more in zip(left, list(left)[1:], strict=False))
    assert left[128] < 1e-4 * left[0]
    _, vectors = torch.linalg.eigh((path - centre).T @ (path - centre))  # the same components from the covariance
    first = vectors[:, -8:]
    rest = path[-1] - centre - first @ (first.T @ (path[-1] - centre))
    assert left[8] == pytest.approx(rest.norm().item(), rel=1e-4)
    assert torch.equal(module.adapter.theta, learned)
