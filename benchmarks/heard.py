"""`heard`: what one step hears of the way to go, by where its timestep lies, with exact gradients and without.

Along Textual Inversion's path on subjects of the tiny world that are not reported. The mean of exact gradients over
many draws of photo, noise and timestep of a range is what a step there should go along; a step's own is one draw's,
exact or as a finite difference along n directions finds it.
"""

from __future__ import annotations

import statistics
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.conditioning import STEPS, gradient_of, trained
from benchmarks.rows import Row, row
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.draws import Draw, step_generator
from mep_lightning.estimators import RandomGradientEstimator

EDGES = (0, 250, 500, 750, 1000)
RANGES = [*pairwise(EDGES), (500, 900)]
"""Quarters of the timesteps, and those that PUTS leaves in the paper."""
N = 8


def run(subjects: int = 4, draws: int = 128, single: int = 32) -> list[Row]:
    """Means over subjects and places on the path, with the deviation over subjects."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for index in range(subjects):
        of_subject: dict[tuple[str, str], list[float]] = {}
        for steps in STEPS:
            module, data = trained(index, steps)
            means = {}
            for low, high in RANGES:
                name = f"{low}..{high}"
                exact = torch.stack([gradient_of(module, _draw(module, data, low, high, i)) for i in range(draws)])
                means[name] = exact.mean(0)
                cosines: dict[str, list[float]] = {}
                for i in range(draws, draws + single):
                    draw = _draw(module, data, low, high, i)
                    for way, one in (
                        ("exact", gradient_of(module, draw)),
                        ("zeroth order", _estimated(module, draw, i)),
                    ):
                        cosines.setdefault(way, []).append(torch.cosine_similarity(one, means[name], dim=0).item())
                figures = {"mean's share of squared length": share(exact)} | {
                    f"cosine of one step with the mean, {way}": statistics.mean(some) for way, some in cosines.items()
                }
                for what, value in figures.items():
                    of_subject.setdefault((name, what), []).append(value)
            everywhere = torch.stack([means[f"{low}..{high}"] for low, high in RANGES[:-1]]).mean(0)
            for name, mean in means.items():
                cosine = torch.cosine_similarity(mean, everywhere, dim=0).item()
                of_subject.setdefault((name, "cosine of the mean with all timesteps'"), []).append(cosine)
        for key, values in of_subject.items():
            found.setdefault(key, []).append(values)
        print(
            f"subject {index}: { ({key: round(statistics.mean(v), 3) for key, v in of_subject.items()}) }", flush=True
        )
    rows = []
    for (name, what), by_subject in found.items():
        own = [statistics.mean(values) for values in by_subject]
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        rows.append(row("heard", name, what, statistics.mean(own), "") | {"spread": spread})
    return rows


def share(gradients: Tensor) -> float:
    """What part of a gradient's squared length is the mean's, unbiased in both: of gradients [draws, d]."""
    squares, total = gradients.square().sum(), gradients.sum(0).square().sum()
    return ((total - squares) / (len(gradients) - 1) / squares).item()


def _draw(module: PersonalizationModule, data: SubjectData, low: int, high: int, number: int) -> Draw:
    generator = step_generator(1, number)
    timestep = torch.randint(low, high, (1,), generator=generator)
    return module.draw_for(data.batch(number), True, generator, timestep)


def _estimated(module: PersonalizationModule, draw: Draw, step: int) -> Tensor:
    """By one-sided differences along N directions, float64 [d]."""
    estimator = RandomGradientEstimator(n=N, mu=1e-3, standardize=False, seed=0)
    theta = module.adapter.numbered()[0].detach()
    grad, _ = estimator.estimate(lambda values: module.losses(values, draw), theta, step)
    return grad.flatten().double()
