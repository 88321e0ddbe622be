"""What a step hears of the way to go."""

import pytest
import torch

from benchmarks.studies import heard


def test_the_share_of_a_mean_is_that_of_its_squared_length():
    g = torch.Generator().manual_seed(0)
    mean, deviation = torch.ones(100), 2.0
    gradients = mean + deviation * torch.randn(4_000, 100, generator=g)
    assert heard.share(gradients) == pytest.approx(1 / (1 + deviation**2), rel=0.02)
    few = [heard.share(deviation * torch.randn(4, 100, generator=g)) for _ in range(400)]
    assert sum(few) / 400 == pytest.approx(0, abs=0.01)


def test_every_range_is_told_by_what_its_gradients_have_in_common(monkeypatch):
    """In a world of known gradients: of length 1 along an axis of the range's own and one that all share, and noise."""
    d, noise = 400, 1.0

    def gradient(_, draw):
        low, high, number = draw
        g = torch.Generator().manual_seed(1_000 * high + 7 * low + number)
        mean = torch.zeros(d, dtype=torch.float64)
        mean[0] = 0.8
        mean[1 + heard.RANGES.index((low, high))] = 0.6
        return mean + noise / d**0.5 * torch.randn(d, generator=g)

    monkeypatch.setattr(heard, "trained", lambda index, steps: (None, None))
    monkeypatch.setattr(heard, "_draw", lambda module, data, *draw: draw)
    monkeypatch.setattr(heard, "gradient_of", gradient)
    monkeypatch.setattr(heard, "_estimated", lambda module, draw, step, seed: -gradient(module, draw))
    told = {(row["case"], row["metric"]): row["value"] for row in heard.run(subjects=2, draws=200, single=200)}
    assert list(dict.fromkeys(case for case, _ in told)) == [f"{low}..{high}" for low, high in heard.RANGES]
    for (case, metric), value in told.items():
        if metric.endswith("length"):
            assert value == pytest.approx(1 / (1 + noise**2), abs=0.02), case
        elif metric.endswith("timesteps'"):
            assert value == pytest.approx(1.0 if case == "0..1000" else 0.64, abs=0.02), case
        else:
            assert value == pytest.approx((-1) ** ("zeroth" in metric) * 0.5**0.5, abs=0.02), (case, metric)
