"""Which timesteps a step trains on: uniform, partially uniform (PUTS), weighted by the signal-to-noise ratio."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from mep_lightning.errors import UserError


class TimestepSampler(ABC):
    """Draws timesteps; all state is in the generator."""

    def follow(self, alphas_cumprod: Tensor) -> None:  # noqa: B027 (most samplers need no schedule)
        """Take the schedule of a base, cumulative alphas [T], where none was given."""

    @abstractmethod
    def sample(self, batch_size: int, generator: Generator | None = None) -> Tensor:
        """Draw timesteps, int64 [B]."""


class PartialUniformTimesteps(TimestepSampler):
    """Partial Uniform Timestep Sampling: t ~ U{low .. high - 1} (ZOODiP, arXiv 2503.14868).

    Args:
        low: T_L, the first timestep that may be drawn.
        high: T_U, one past the last.

    Raises:
        UserError: the range is empty or below zero.
    """

    def __init__(self, low: int, high: int):
        if not 0 <= low < high:
            raise UserError(f"timesteps {low} to {high} are no range: PUTS needs 0 <= low < high, such as 500 and 900")
        self.low, self.high = low, high

    def sample(self, batch_size: int, generator: Generator | None = None) -> Tensor:
        return torch.randint(self.low, self.high, (batch_size,), generator=generator)


class UniformTimesteps(PartialUniformTimesteps):
    """All timesteps alike: t ~ U{0 .. T - 1}.

    Args:
        total: T; None takes that of the module's base, 1,000 until there is one.
    """

    def __init__(self, total: int | None = None):
        super().__init__(0, 1000 if total is None else total)
        self._given = total is not None

    def follow(self, alphas_cumprod: Tensor) -> None:
        if not self._given:
            self.high = len(alphas_cumprod)


class SNRTimesteps(TimestepSampler):
    """Timesteps in proportion to the min-SNR-gamma weight of the noise error (arXiv 2303.09556).

    The weight of the noise-prediction error, w(t) = min(SNR(t), gamma) / SNR(t), becomes the probability of drawing t,
    so that an unweighted loss over these draws has the weighted loss's gradient up to a constant.

    Args:
        alphas_cumprod: the schedule's cumulative alphas, [T]; None takes those of the module's base.
        gamma: where the weight stops growing.
    """

    def __init__(self, alphas_cumprod: Tensor | None = None, gamma: float = 5.0):
        self.gamma = gamma
        self._given = alphas_cumprod is not None
        self.probability = None if alphas_cumprod is None else self._weights(alphas_cumprod)

    def follow(self, alphas_cumprod: Tensor) -> None:
        if not self._given:
            self.probability = self._weights(alphas_cumprod)

    def _weights(self, alphas_cumprod: Tensor) -> Tensor:
        alphas = alphas_cumprod.double().cpu()
        snr = alphas / (1 - alphas)
        return (self.gamma / snr).clamp_max(1).float()  # min(SNR, gamma) / SNR, also where a schedule ends at SNR 0

    def sample(self, batch_size: int, generator: Generator | None = None) -> Tensor:
        if self.probability is None:
            raise UserError("SNRTimesteps has no schedule yet: give it alphas_cumprod, or to a PersonalizationModule")
        return torch.multinomial(self.probability, batch_size, replacement=True, generator=generator)
