"""Which branch a step takes: zeroth order at high resolution, or backpropagation at low resolution.

Selective optimisation (arXiv 2507.10029) draws it with a probability that knows the timestep: BP-low learns fast and
distorts structure, which is decided at high timesteps; ZO-high sees the details, and works once the adapter has begun
to fit. The paper's exact function could not be checked: `TimestepAwareSelector` is ours, after what the paper says.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from torch import Tensor

from mep_lightning.errors import refuse_unless

TIMESTEPS = 1000
"""T of every base here."""


class Selector(ABC):
    """Draws the branch of a step from its (seed, step) and its timesteps alone, so that every rank draws the same."""

    @abstractmethod
    def probability(self, t: float, step: int, total_steps: int) -> float:
        """Of ZO-high, in [0, 1].

        Args:
            t: timestep, 0 to T - 1.
            step: the step, from 0.
            total_steps: K, how many there will be.
        """

    def takes_high(self, timestep: Tensor, seed: int, step: int, total_steps: int) -> bool:
        """Whether a step takes ZO-high. timestep int64 [B]: a batch takes one branch, with their mean probability."""
        chances = [self.probability(t, step, total_steps) for t in timestep.tolist()]
        return random.Random(f"mep branch {seed} {step}").random() < sum(chances) / len(chances)


class TimestepAwareSelector(Selector):
    """p(ZO-high | t, k) = (t / T)^alpha (k / K)^beta after a warm-up of BP-low alone.

    Args:
        alpha: how fast it rises with the timestep; 0 leaves the timestep out.
        beta: how fast it rises with progress; 0 leaves progress out.
        warmup: share of the steps that are BP-low alone, in [0, 1].
        falling: whether it falls with the timestep instead, as (1 - t / T)^alpha: for bases whose gradient at low
            resolution is off at low timesteps.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, warmup: float = 0.1, falling: bool = False) -> None:
        refuse_unless(alpha >= 0, "TimestepAwareSelector.alpha", alpha, "0 or more")
        refuse_unless(beta >= 0, "TimestepAwareSelector.beta", beta, "0 or more")
        _refuse_no_share("TimestepAwareSelector.warmup", warmup)
        self.alpha, self.beta, self.warmup, self.falling = alpha, beta, warmup, falling

    def probability(self, t: float, step: int, total_steps: int) -> float:
        if step < self.warmup * total_steps:
            return 0.0
        share = 1 - t / TIMESTEPS if self.falling else t / TIMESTEPS
        return min(1.0, share**self.alpha * (step / total_steps) ** self.beta)


class ConstantSelector(Selector):
    """The same probability at every timestep and step.

    Args:
        chance: of ZO-high, in [0, 1]; 0 is BP-low alone, 1 ZO-high alone.
    """

    def __init__(self, chance: float = 0.5) -> None:
        _refuse_no_share("ConstantSelector.chance", chance)
        self.chance = chance

    def probability(self, t: float, step: int, total_steps: int) -> float:
        return self.chance


class StepwiseSelector(Selector):
    """BP-low first, ZO-high from one step on.

    Args:
        switch: after which share of the steps, in [0, 1].
    """

    def __init__(self, switch: float = 0.5) -> None:
        _refuse_no_share("StepwiseSelector.switch", switch)
        self.switch = switch

    def probability(self, t: float, step: int, total_steps: int) -> float:
        return float(step >= self.switch * total_steps)


def _refuse_no_share(name: str, value: float) -> None:
    refuse_unless(0 <= value <= 1, name, value, "a share from 0 to 1")
