"""`heard`: what one step hears of the way to go, by where its timestep lies, with exact gradients and without.

Along Textual Inversion's path on subjects of the tiny world that are not reported. The mean of exact gradients over
many draws of photo, noise and timestep of a range is what a step there should go along; a step's own is one draw's,
exact or as a finite difference along n directions finds it.
"""

from __future__ import annotations

import statistics
from itertools import pairwise

import torch
from torch import Tensor, cosine_similarity

from benchmarks.rows import Row, row
from benchmarks.studies.conditioning import STEPS, gradient_of, trained
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.draws import Draw, step_generator
from mep_lightning.estimators import RandomGradientEstimator

EDGES = (0, 250, 500, 750, 1000)
RANGES = [(0, 1000), *pairwise(EDGES), (500, 900)]
"""All timesteps, their quarters, and those that PUTS leaves in the paper."""
N = 8
OTHERS = 10_000
"""Draws from here on are in no range's mean."""


def run(subjects: int = 4, draws: int = 128, single: int = 32) -> list[Row]:
    """Means over subjects and places on the path, with the deviation over subjects."""
    found: dict[tuple[str, str], list[float]] = {}
    for index in range(subjects):
        of_subject: dict[tuple[str, str], list[float]] = {}
        for place, steps in enumerate(STEPS):
            module, data = trained(index, steps)
            everywhere = _exact(module, data, *RANGES[0], range(OTHERS, OTHERS + draws)).mean(0)
            for low, high in RANGES:
                mean, figures = _within(module, data, low, high, draws, single, seed=10 * index + place)
                figures["cosine of the mean with all timesteps'"] = cosine_similarity(mean, everywhere, dim=0).item()
                for what, value in figures.items():
                    of_subject.setdefault((f"{low}..{high}", what), []).append(value)
        means = {key: statistics.mean(values) for key, values in of_subject.items()}
        for key, value in means.items():
            found.setdefault(key, []).append(value)
        print(f"subject {index}: { ({key: round(value, 3) for key, value in means.items()}) }", flush=True)
    return [
        row("heard", name, what, statistics.mean(values), "")
        | {"spread": statistics.stdev(values) if len(values) > 1 else 0.0}
        for (name, what), values in found.items()
    ]


def _within(
    module: PersonalizationModule, data: SubjectData, low: int, high: int, draws: int, single: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """The mean of a range's exact gradients [d], and what of it single steps on other draws hear."""
    gradients, others = _exact(module, data, low, high, range(draws)), range(draws, draws + single)
    mean = gradients.mean(0)
    steps = {
        "exact": _exact(module, data, low, high, others),
        "zeroth order": torch.stack([_estimated(module, _draw(module, data, low, high, i), i, seed) for i in others]),
    }
    figures = {"mean's share of squared length": share(gradients)}
    for way, some in steps.items():
        heard = cosine_similarity(some, mean[None], dim=1).mean().item()
        figures[f"cosine of one step with the mean, {way}"] = heard
    return mean, figures


def share(gradients: Tensor) -> float:
    """What part of a gradient's squared length is the mean's, unbiased in both: of gradients [draws, d]."""
    squares, total = gradients.square().sum(), gradients.sum(0).square().sum()
    return ((total - squares) / (len(gradients) - 1) / squares).item()


def _exact(module: PersonalizationModule, data: SubjectData, low: int, high: int, numbers: range) -> Tensor:
    """Gradients of those draws, float64 [len(numbers), d]."""
    return torch.stack([gradient_of(module, _draw(module, data, low, high, i)) for i in numbers])


def _draw(module: PersonalizationModule, data: SubjectData, low: int, high: int, number: int) -> Draw:
    generator = step_generator(1, number)
    timestep = torch.randint(low, high, (1,), generator=generator)
    return module.draw_for(data.batch(number), True, generator, timestep)


def _estimated(module: PersonalizationModule, draw: Draw, step: int, seed: int) -> Tensor:
    """By one-sided differences along N directions of (seed, step), float64 [d]."""
    estimator = RandomGradientEstimator(n=N, mu=1e-3, standardize=False, seed=seed)
    theta = module.adapter.numbered()[0].detach()
    grad, _ = estimator.estimate(lambda values: module.losses(values, draw), theta, step)
    return grad.flatten().double()
