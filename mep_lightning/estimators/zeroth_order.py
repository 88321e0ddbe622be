"""Gradients from forward passes only: random directions e_i ~ N(0, I), and how much the loss changes along each.

n directions, V members, mu the step, d dimensions. An estimate is g = (1/n) sum_i c_i e_i; the estimators differ in
where their members stand (`probes`) and in what the losses say about each direction (`coefficients`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mep_lightning.errors import SEEDS, UserError, refuse_unless
from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.estimators.perturbation import Members, Probe, combine


class ZerothOrderEstimator(Estimator):
    """What all of them share.

    Args:
        n: how many directions, at least 1; "auto" is what a module takes from its defaults.
        mu: the finite step, positive; "auto" as for n.
        normalize: divide by sqrt((d + n - 1) / n), the length of g over that of the gradient it estimates (ZOODiP).
        standardize: divide by std(L) / mu, the losses' (population) standard deviation over all members, as FZOO
            (arXiv 2506.09034) does over the perturbed ones. Differences then make steps of about the same length, so
            that timesteps with small slopes count as much as those with large ones; with n = 1 only the slope's sign is
            left. "auto" as for n.
        seed: of the directions; None takes the module's, or 0 where there is none.
    """

    forward_only = True
    AUTO: ClassVar[dict[str, str]] = {"n": "n", "mu": "mu", "standardize": "standardize"}

    def __init__(
        self,
        n: int | Literal["auto"] = 1,
        mu: float | Literal["auto"] = 1e-3,
        normalize: bool = False,
        seed: int | None = None,
        standardize: bool | Literal["auto"] = False,
    ) -> None:
        if n != "auto" and not (isinstance(n, int) and n >= 1):
            raise UserError(f"{type(self).__name__}.n is {n}, but an estimate needs 1, 2, ... directions")
        if mu != "auto" and not (isinstance(mu, (int, float)) and mu > 0 and math.isfinite(mu)):
            raise UserError(f"{type(self).__name__}.mu is {mu}, but the step must be a positive number, such as 1e-3")
        refuse_unless(seed is None or 0 <= seed < SEEDS, f"{type(self).__name__}.seed", seed, f"0 to {SEEDS - 1}")
        self.n: int | Literal["auto"] = n
        self.mu: float | Literal["auto"] = mu
        self.normalize = normalize
        self.standardize: bool | Literal["auto"] = standardize
        self.seed = seed

    @property
    @abstractmethod
    def probes(self) -> list[Probe]:
        """Where the V members stand."""

    @abstractmethod
    def coefficients(self, losses: Tensor) -> Tensor:
        """What the losses [V] say about the directions: c [n]."""

    @property
    def members(self) -> int:
        return len(self.probes)

    @property
    def count(self) -> int:
        """n as a number. Raises UserError while it is "auto"."""
        return int(self._known("n", "n=2"))

    @property
    def step_size(self) -> float:
        """mu as a number. Raises UserError while it is "auto"."""
        return float(self._known("mu", "mu=1e-3"))

    def _known(self, setting: str, example: str) -> float:
        value = getattr(self, setting)
        if value == "auto":
            raise UserError(f"{type(self).__name__}.{setting} is 'auto' outside a module; set it, such as {example}")
        return value

    def weights(self, losses: Tensor, dims: int) -> Tensor:
        """c_i / n, normalised and standardised where asked for: g = sum_i weights_i e_i. losses [V] -> [n].

        Raises:
            UserError: standardize still is "auto".
        """
        n = self.count
        weights = self.coefficients(losses) / n
        if self.normalize:
            weights = weights / math.sqrt((dims + n - 1) / n)
        if self._known("standardize", "standardize=False"):
            std = losses.std(correction=0)
            weights = torch.where(std == 0, 0.0, weights * (self.step_size / std))  # equal losses tell no direction
        return weights

    def around(self, step: int) -> Members:
        """The members of a step."""
        return Members(self.probes, self.step_size, self.seed or 0, step)

    @torch.no_grad()
    def weigh(
        self,
        loss_fn: Callable[[Members], Tensor],
        dims: int,
        step: int = 0,
        parameters: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`estimate` without its last step, of any number of parameters.

        Args:
            loss_fn: the losses [V] of members.
            dims: d, the dimensions left after projection.
            step: the same (seed, step) gives the same directions.
            parameters: parameter id -> parameter, whose noise may be drawn beforehand.

        Returns:
            weights [n], g = sum_i weights_i e_i, and the losses [V].
        """
        losses = loss_fn(self.around(step).drawn_for(parameters or {}))
        if losses.shape != (self.members,):
            raise UserError(f"loss_fn must answer with one loss a member, [{self.members}], not {list(losses.shape)}")
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        return self.weights(losses, dims), losses

    @torch.no_grad()
    def estimate(self, loss_fn: LossFn, theta: Tensor, step: int = 0, dims: int | None = None) -> tuple[Tensor, Tensor]:
        """As `Estimator.estimate`, under no_grad."""
        theta = theta.detach()
        dims = theta.numel() if dims is None else dims
        weights, losses = self.weigh(lambda members: loss_fn(members.of(theta)), dims, step)
        return combine(weights, theta, self.seed or 0, step), losses


class RandomGradientEstimator(ZerothOrderEstimator):
    """One-sided (RGE, ZOODiP's): c_i = [L(theta + mu e_i) - L(theta)] / mu, n + 1 members, the first at theta."""

    def __init__(
        self,
        n: int | Literal["auto"] = 2,
        mu: float | Literal["auto"] = 1e-3,
        normalize: bool = False,
        seed: int | None = None,
        standardize: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(n, mu, normalize, seed, standardize)

    @property
    def probes(self) -> list[Probe]:
        return [(0, 0.0), *((i, 1.0) for i in range(self.count))]

    def coefficients(self, losses: Tensor) -> Tensor:
        return (losses[1:] - losses[0]) / self.step_size


class SPSAEstimator(ZerothOrderEstimator):
    """Two-sided (SPSA, MeZO's): c_i = [L(theta + mu e_i) - L(theta - mu e_i)] / 2 mu, 2n members.

    On a quadratic c_i is <grad, e_i> exactly, whatever mu.
    """

    @property
    def probes(self) -> list[Probe]:
        return [(i, sign) for i in range(self.count) for sign in (1.0, -1.0)]

    def coefficients(self, losses: Tensor) -> Tensor:
        return (losses[0::2] - losses[1::2]) / (2 * self.step_size)


class OnePointEstimator(ZerothOrderEstimator):
    """One evaluation a direction: c_i = L(theta + mu e_i) / mu, n members; as unbiased, with far more variance.

    Its losses are no differences, so there is nothing to standardize.
    """

    AUTO: ClassVar[dict[str, str]] = {"n": "n", "mu": "mu"}

    def __init__(
        self,
        n: int | Literal["auto"] = 1,
        mu: float | Literal["auto"] = 1e-3,
        normalize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(n, mu, normalize, seed)

    @property
    def probes(self) -> list[Probe]:
        return [(i, 1.0) for i in range(self.count)]

    def coefficients(self, losses: Tensor) -> Tensor:
        return losses / self.step_size
