"""What a step hears of the way to go."""

import pytest
import torch

from benchmarks import heard


def test_the_share_of_a_mean_is_that_of_its_squared_length():
    g = torch.Generator().manual_seed(0)
    mean, deviation = torch.ones(100), 2.0
    gradients = mean + deviation * torch.randn(4_000, 100, generator=g)
    assert heard.share(gradients) == pytest.approx(1 / (1 + deviation**2), rel=0.02)
    few = [heard.share(deviation * torch.randn(4, 100, generator=g)) for _ in range(400)]
    assert sum(few) / 400 == pytest.approx(0, abs=0.01)


def test_every_range_has_its_figures(monkeypatch):
    monkeypatch.setattr(heard, "STEPS", (1,))
    rows = heard.run(subjects=1, draws=4, single=2)
    cases = [f"{low}..{high}" for low, high in heard.RANGES]
    assert list(dict.fromkeys(row["case"] for row in rows)) == cases
    assert len(rows) == 4 * len(cases)
    assert all(-1 <= row["value"] <= 1 for row in rows)
    of_all = [row["value"] for row in rows if row["metric"].endswith("all timesteps'")]
    assert max(of_all) > 0.5
