"""The slope of memory and speed: a known line, an error that knows neighbours are alike, and a verdict with both."""

import pytest
import torch

from reliability.soak import CHANGES, FLAT, STEPS, UNDECIDED, Watch, fit_slope, rows


def test_a_line_is_found_without_error():
    steps = list(range(0, 1000, 10))
    slope = fit_slope(steps, [5 + 3 * step / STEPS for step in steps])
    assert slope.value == pytest.approx(3, abs=1e-9) and slope.error == pytest.approx(0, abs=1e-6)


def test_the_error_covers_the_truth_about_as_often_as_it_should():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        noise = torch.randn(100, generator=generator, dtype=torch.float64)
        slope = fit_slope(range(100), noise.tolist())
        hits += abs(slope.value) < 2 * slope.error
    assert 0.9 < hits / 300 <= 1


def test_likeness_of_neighbours_widens_the_error():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alike = noise.clone()
    for index in range(1, 400):
        alike[index] += 0.8 * alike[index - 1]
    shuffled = alike[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    ratio = fit_slope(range(400), alike.tolist()).error / fit_slope(range(400), shuffled.tolist()).error
    assert ratio == pytest.approx((1.8 / 0.2) ** 0.5, rel=0.25)  # sqrt((1 + r) / (1 - r))


@pytest.mark.parametrize(
    ("growth", "noise", "verdict"), [(0.0, 0.0, FLAT), (4e-7, 0.0, FLAT), (1e-4, 0.0, CHANGES), (0.0, 0.1, UNDECIDED)]
)
def test_the_verdict(growth, noise, verdict):
    watch = Watch(10)
    watch.steps = list(range(10, 2010, 10))
    drawn = [noise * (-1) ** index for index in range(len(watch.steps))]
    watch.resident = [600 * (1 + growth * step + one) for step, one in zip(watch.steps, drawn, strict=True)]
    watch.speeds = [20 * (1 - growth * step + one) for step, one in zip(watch.steps, drawn, strict=True)]
    found = {one["metric"]: one["value"] for one in rows("a", watch, 2000, 1.0)}
    assert found["resident memory, verdict"] == verdict
    assert found["speed, verdict"] == verdict
