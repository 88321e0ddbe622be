"""What the literature does otherwise than what is shipped, for the suites `estimators` and `search`.

They are here alone, so that their figures can be had again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from mep_lightning import PersonalizationModule
from mep_lightning.draws import Draw
from mep_lightning.errors import UserError
from mep_lightning.estimators import CMAES, RandomGradientEstimator
from mep_lightning.estimators.estimator import LossFn
from mep_lightning.estimators.perturbation import Probe
from mep_lightning.estimators.subspace import Subspace
from mep_lightning.kernels import philox_normal


class GuidedSearch(Subspace):
    """Directions of which half the length lies in the span of the last updates (guided evolutionary strategies).

    Covariance 1/2 I + d/2k U U' (arXiv 1806.10230 with alpha = 1/2, d times as long), U the orthonormal basis of the
    last k updates of the token.

    Args:
        last: k.
    """

    def __init__(self, last: int = 16) -> None:
        self.before: Tensor | None = None
        self.updates: deque[Tensor] = deque(maxlen=last)

    def observe(self, theta: Tensor) -> None:
        now = theta.detach().flatten().float().cpu()
        if self.before is not None:
            self.updates.append(now - self.before)
        self.before = now.clone()

    @property
    def basis(self) -> Tensor | None:
        return None

    def adopt(self, basis: Tensor) -> None:
        return

    @property
    def dims_left(self) -> int | None:
        return None if self.before is None else len(self.before)

    def kept(self, d: int) -> int:
        return 0

    def directions(self, seed: int, step: int, n: int) -> Tensor | None:
        if self.before is None or not self.updates:
            return None
        d, k = len(self.before), len(self.updates)
        everywhere = philox_normal(seed, step, range(n), 0, d)
        basis = torch.linalg.qr(torch.stack(list(self.updates)).T).Q  # [d, k]
        within = philox_normal(seed, step, range(n), 1, k)
        return everywhere / math.sqrt(2) + math.sqrt(d / (2 * k)) * within @ basis.T

    def basis_on(self, device: torch.device) -> Tensor | None:
        return None

    def project_(self, grad: Tensor) -> Tensor:
        return grad

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise UserError("GuidedSearch is not resumed: start anew")


class ScalarMoment(RandomGradientEstimator):
    """Divides by the root of a running mean of squared slopes, one number for all (MEAZO, arXiv 2605.03869).

    An optimizer's own second moments must not follow it: a large eps leaves Adam's momentum alone.
    """

    beta = 0.99

    def __init__(self, n: int, mu: float, normalize: bool = False, seed: int | None = None) -> None:
        super().__init__(n, mu, normalize, seed, standardize=False)
        self.moment, self.told = 0.0, 0

    def weights(self, losses: Tensor, dims: int, orthogonal: bool = False) -> Tensor:
        weights = super().weights(losses, dims, orthogonal)
        self.told += 1
        self.moment = self.beta * self.moment + (1 - self.beta) * weights.square().mean().item()
        mean = self.moment / (1 - self.beta**self.told)
        return weights / math.sqrt(mean) if mean else weights


class NeighbouringPoints(RandomGradientEstimator):
    """What ZOODiP's supplement calls one-point (its Eq. S12): differences of neighbouring points, each told to one's
    direction, c_i = [L(theta + mu e_i) - L(theta + mu e_i-1)] / mu.

    The equation has e_i-1 in its place, whose expectation is the gradient turned round.
    """

    @property
    def probes(self) -> list[Probe]:
        return [(i, 1.0) for i in range(self.count)]

    def coefficients(self, losses: Tensor) -> Tensor:
        return torch.cat([losses.new_zeros(1), losses.diff()]) / self.step_size


class UnitComponents(CMAES):
    """Searches along the vocabulary's principal components as they are, of length 1, from init plus its mean.

    As the public code of gradient-free textual inversion (github.com/feizc/Gradient-Free-Textual-Inversion) does by
    default: sigma 1 draws tokens sqrt(dims) away, where words are a vocabulary's deviation apart.
    """

    def _begin(self, theta: Tensor, population: int) -> None:
        super()._begin(theta, population)
        assert self._vocabulary is not None and self._start is not None
        self._start = self._start + self._vocabulary().float().mean(0).cpu()

    def _principal(self, width: int) -> Tensor:
        return torch.nn.functional.normalize(super()._principal(width), dim=1)


class RandomDirections(CMAES):
    """Searches along normal directions, so long that sigma 1 draws entries that vary as the vocabulary's do.

    That code's option `prior_normal`.
    """

    def _principal(self, width: int) -> Tensor:
        assert self._vocabulary is not None
        deviation = self._vocabulary().float().std().item()
        return philox_normal(self.seed or 0, 0, range(int(self.dims)), 1, width) * deviation / math.sqrt(self.dims)


class BestOfPopulation(CMAES):
    """Ends every step, and so the search, at the best of its population instead of the search's mean, as that code."""

    @torch.no_grad()
    def estimate(self, loss_fn: LossFn, theta: Tensor, step: int = 0, dims: int | None = None) -> tuple[Tensor, Tensor]:
        _, losses = super().estimate(loss_fn, theta, step, dims)
        (best,) = self._tokens(self.best[None], theta)
        return theta - best, losses

    def _tell(self, drawn: list[Any], losses: Tensor) -> None:
        self.best = drawn[int(losses.nan_to_num(nan=math.inf).argmin())]
        super()._tell(drawn, losses)


class PublicCMAES(UnitComponents, BestOfPopulation):
    """Components of length 1, and the best of the last population."""


class OwnNoise(PersonalizationModule):
    """Hears every member's loss under a noise of its own, as that code, where members share it otherwise.

    For bases that predict the noise; not resumed.
    """

    def losses(self, members: Any, draw: Draw) -> Tensor:
        rest = 1 - self.loaded().scheduler.alphas_cumprod[draw.timestep.cpu()].to(draw.noisy)[:, None, None, None]
        told = []
        for member in members.split(1):
            noise = torch.randn(draw.target.shape, generator=self.noises).to(draw.target)
            noisy = draw.noisy + rest.sqrt() * (noise - draw.target).to(draw.noisy)
            told.append(super().losses(member, replace(draw, noisy=noisy, target=noise)))
        return torch.cat(told)

    @cached_property
    def noises(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class PromptSearch(Callback):
    """Starts from the word of the vocabulary whose loss is least, over a few draws of a step's.

    Args:
        draws: how many.
        together: words in one forward pass.
    """

    def __init__(self, draws: int = 2, together: int = 64) -> None:
        self.draws, self.together = draws, together

    @torch.no_grad()
    def on_train_start(self, trainer: Any, module: Any) -> None:
        theta, numbers = module.adapter.theta, words(module.loaded())
        table = module.loaded().text_encoders[0].get_input_embeddings().weight
        values = table[torch.tensor(numbers)].float()[:, None]  # [V, 1, d]
        total = torch.zeros(len(values))
        for index in range(self.draws):
            draw = module.draw_at(trainer.datamodule.batch(index), index)
            losses = [module.losses(some, draw).cpu() for some in values.split(self.together)]
            total += torch.cat(losses)
        theta.data.copy_(values[total.argmin()])


def words(base: Any) -> list[int]:
    """Numbers of the vocabulary's whole words."""
    vocabulary = base.tokenizers[0].get_vocab()
    return [number for word, number in vocabulary.items() if "</w>" in word and word.removesuffix("</w>").isalpha()]
