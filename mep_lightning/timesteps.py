"""Which timesteps a step trains on: uniform, partially uniform (PUTS), weighted by the signal-to-noise ratio."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Generator, Tensor

from mep_lightning.errors import UserError


class TimestepSampler(ABC):
    """Draws timesteps; all state is in the generator."""

    def follow(self, alphas_cumprod: Tensor, prediction: str = "epsilon") -> None:  # noqa: B027 (most need no schedule)
        """Take what a base was trained by, where nothing was given.

        Args:
            alphas_cumprod: its schedule's cumulative alphas, [T].
            prediction: what its U-Net predicts, "epsilon" or "v_prediction".
        """

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

    def follow(self, alphas_cumprod: Tensor, prediction: str = "epsilon") -> None:
        if not self._given:
            self.high = len(alphas_cumprod)


class SNRTimesteps(TimestepSampler):
    """Timesteps in proportion to the min-SNR-gamma weight of the prediction's error (arXiv 2303.09556).

    The weight of the error of predicted noise, w(t) = min(SNR(t), gamma) / SNR(t), or of predicted v, min(SNR(t),
    gamma) / (SNR(t) + 1), becomes the probability of drawing t, so that an unweighted loss over these draws has the
    weighted loss's gradient up to a constant.

    Args:
        alphas_cumprod: the schedule's cumulative alphas, [T]; None takes those of the module's base.
        gamma: where the weight stops growing.
        prediction: what the U-Net predicts, with a schedule that is given; without one it is what the base's does.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | None = None,
        gamma: float = 5.0,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
    ):
        self.gamma = gamma
        self._given = alphas_cumprod is not None
        self.probability = None if alphas_cumprod is None else self._weights(alphas_cumprod, prediction)

    def follow(self, alphas_cumprod: Tensor, prediction: str = "epsilon") -> None:
        if not self._given:
            self.probability = self._weights(alphas_cumprod, prediction)

    def _weights(self, alphas_cumprod: Tensor, prediction: str) -> Tensor:
        alphas = alphas_cumprod.double().cpu()
        snr = alphas / (1 - alphas)
        if prediction == "v_prediction":
            return (snr.clamp_max(self.gamma) * (1 - alphas)).float()  # 1 / (SNR + 1) is 1 - alpha
        return (self.gamma / snr).clamp_max(1).float()  # min(SNR, gamma) / SNR, also where a schedule ends at SNR 0

    def sample(self, batch_size: int, generator: Generator | None = None) -> Tensor:
        if self.probability is None:
            raise UserError("SNRTimesteps has no schedule yet: give it alphas_cumprod, or to a PersonalizationModule")
        return torch.multinomial(self.probability, batch_size, replacement=True, generator=generator)
