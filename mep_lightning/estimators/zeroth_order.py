"""Gradients from forward passes only: random directions e_i ~ N(0, I), and how much the loss changes along each.

n directions, V members, mu the step, d dimensions. An estimate is g = (1/n) sum_i c_i e_i. Finite differences differ in
where their members stand (`probes`) and in what the losses say about each direction (`coefficients`); the forward
gradient (`forward_gradient`) asks for the derivative itself.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mep_lightning.distributed import ALONE, Ranks
from mep_lightning.errors import SEEDS, UserError, refuse_unless
from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.estimators.perturbation import Members, Probe, combine
from mep_lightning.kernels.tf32 import whole_products


class ZerothOrderEstimator(Estimator):
    """What all that ask along random directions share.

    Args:
        n: how many directions, at least 1; "auto" is what a module takes from its defaults.
        normalize: divide by sqrt((d + n - 1) / n), the length of g over that of the gradient it estimates (ZOODiP's).
        standardize: divide by the losses' spread (`spread`), as FZOO (arXiv 2506.09034) does. Differences then make
            steps of about the same length, so that timesteps with small slopes count as much as those with large ones;
            with n = 1 only the slope's sign is left. "auto" as for n.
        seed: of the directions; None takes the module's, or 0 where there is none.
    """

    forward_only = True
    AUTO: ClassVar[dict[str, str]] = {"n": "n", "standardize": "standardize"}

    def __init__(
        self,
        n: int | Literal["auto"],
        normalize: bool = False,
        seed: int | None = None,
        standardize: bool | Literal["auto"] = False,
    ) -> None:
        if n != "auto" and not (isinstance(n, int) and n >= 1):
            raise UserError(f"{type(self).__name__}.n is {n}, but an estimate needs 1, 2, ... directions")
        refuse_unless(seed is None or 0 <= seed < SEEDS, f"{type(self).__name__}.seed", seed, f"0 to {SEEDS - 1}")
        self.n: int | Literal["auto"] = n
        self.normalize = normalize
        self.standardize: bool | Literal["auto"] = standardize
        self.seed = seed

    @abstractmethod
    def around(self, step: int) -> Members:
        """The members of a step."""

    @abstractmethod
    def coefficients(self, losses: Tensor) -> Tensor:
        """What is heard of the losses says about the directions: c [n]."""

    @abstractmethod
    def spread(self, losses: Tensor) -> Tensor:
        """What `standardize` divides by, in the unit of the coefficients; a scalar."""

    def heard(self, losses: Tensor, members: int) -> Tensor:
        """What a loss function answers of some members, as `coefficients` reads it; in fp32 at least."""
        if losses.shape != (members,):
            raise UserError(f"loss_fn must answer with one loss a member, [{members}], not {list(losses.shape)}")
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    @property
    def answers(self) -> int:
        """How many numbers are heard of a step."""
        return self.members

    @property
    def shares(self) -> int:
        """Among how many processes a step can be shared out."""
        return self.members

    @property
    def count(self) -> int:
        """n as a number. Raises UserError while it is "auto"."""
        return int(self._known("n", "n=2"))

    def _known(self, setting: str, example: str) -> float:
        value = getattr(self, setting)
        if value == "auto":
            raise UserError(f"{type(self).__name__}.{setting} is 'auto' outside a module; set it, such as {example}")
        return value

    def weights(self, losses: Tensor, dims: int, orthogonal: bool = False) -> Tensor:
        """c_i / n, normalised and standardised where asked for: g = sum_i weights_i e_i. What is heard -> [n].

        Args:
            losses: what is heard.
            dims: d, the dimensions left after projection.
            orthogonal: whether directions are so to one another, d at a time: g is then sqrt(d / n) times as long as
                the gradient for n up to d, and as long for more.

        Raises:
            UserError: standardize still is "auto".
        """
        n = self.count
        weights = self.coefficients(losses) / n
        if self.normalize:
            weights = weights / math.sqrt(max(dims / n, 1.0) if orthogonal else (dims + n - 1) / n)
        if self._known("standardize", "standardize=False"):
            spread = self.spread(losses)
            weights = torch.where(spread == 0, 0.0, weights / spread)  # equal losses tell no direction
        return weights

    @torch.no_grad()
    def weigh(
        self,
        loss_fn: Callable[[Members], Tensor],
        dims: int,
        step: int = 0,
        parameters: Mapping[int, Tensor] | None = None,
        along: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[Tensor, Tensor]:
        """`estimate` without its last step, of any number of parameters.

        Args:
            loss_fn: the losses [V] of members.
            dims: d, the dimensions left after projection.
            step: the same (seed, step) gives the same directions.
            parameters: parameter id -> parameter, whose noise may be drawn beforehand.
            along: the directions e_i of one parameter, id 0, fp32 [n, numel], instead of those of (seed, step);
                orthogonal to one another, `dims` at a time.
            ranks: the processes that share the members, or average what is heard of them.

        Returns:
            weights [n], g = sum_i weights_i e_i, and the losses [V].
        """
        heard = self._heard_of(self.asked(step, along), loss_fn, parameters or {}, ranks)
        return self.weights(heard, dims, along is not None), heard[: self.members]

    def asked(self, step: int, along: Tensor | None = None) -> Members:
        """The members of a step, along the directions of (seed, step) or along those that are given (`weigh`)."""
        members = self.around(step)
        if along is None:
            return members
        if len(along) != self.count:
            raise UserError(f"{type(self).__name__} asks along {self.count} directions, and was given {len(along)}")
        return replace(members, noise={0: along})

    def _heard_of(
        self, members: Members, loss_fn: Callable[[Members], Tensor], parameters: Mapping[int, Tensor], ranks: Ranks
    ) -> Tensor:
        """What is heard of all members, some or all of which other ranks evaluate."""
        if not ranks.shares_members:
            drawn = members if members.noise else members.drawn_for(parameters)
            return ranks.averaged_(self.heard(loss_fn(drawn), len(members)))
        mine, places = members.part(ranks.rank, ranks.world)
        drawn = mine if mine.noise else mine.drawn_for(parameters)
        heard = self.heard(loss_fn(drawn), len(mine))
        return ranks.gathered(heard[len(heard) - len(places) :], places, self.answers)

    @torch.no_grad()
    def estimate(
        self,
        loss_fn: LossFn,
        theta: Tensor,
        step: int = 0,
        dims: int | None = None,
        along: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Estimator.estimate`, under no_grad; `along` as for `weigh`."""
        theta = theta.detach()
        dims = theta.numel() if dims is None else dims
        weights, losses = self.weigh(lambda members: loss_fn(members.of(theta)), dims, step, along=along)
        if along is not None:
            return (weights.to(along) @ along).view(theta.shape).to(theta.dtype), losses
        return combine(weights, theta, self.seed or 0, step), losses


class FiniteDifferenceEstimator(ZerothOrderEstimator):
    """How much the loss changes over a finite step along each direction.

    Args:
        n, normalize, seed, standardize: as of `ZerothOrderEstimator`.
        mu: the finite step, positive; "auto" as for n.
    """

    AUTO: ClassVar[dict[str, str]] = ZerothOrderEstimator.AUTO | {"mu": "mu"}

    def __init__(
        self,
        n: int | Literal["auto"] = 1,
        mu: float | Literal["auto"] = 1e-3,
        normalize: bool = False,
        seed: int | None = None,
        standardize: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(n, normalize, seed, standardize)
        if mu != "auto" and not (isinstance(mu, (int, float)) and mu > 0 and math.isfinite(mu)):
            raise UserError(f"{type(self).__name__}.mu is {mu}, but the step must be a positive number, such as 1e-3")
        self.mu: float | Literal["auto"] = mu

    @property
    @abstractmethod
    def probes(self) -> list[Probe]:
        """Where the V members stand."""

    @property
    def members(self) -> int:
        return len(self.probes)

    @property
    def step_size(self) -> float:
        """mu as a number. Raises UserError while it is "auto"."""
        return float(self._known("mu", "mu=1e-3"))

    def around(self, step: int) -> Members:
        return Members(self.probes, self.step_size, self.seed or 0, step)

    def weigh(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As `ZerothOrderEstimator.weigh`, in whole fp32 products: TF32's 10 bits drown a difference."""
        with whole_products():
            return super().weigh(*given, **named)

    def spread(self, losses: Tensor) -> Tensor:
        """std(L) / mu, over all members (FZOO: over the perturbed ones); population standard deviation."""
        return losses.std(correction=0) / self.step_size


class RandomGradientEstimator(FiniteDifferenceEstimator):
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


class SPSAEstimator(FiniteDifferenceEstimator):
    """Two-sided (SPSA, MeZO's): c_i = [L(theta + mu e_i) - L(theta - mu e_i)] / 2 mu, 2n members.

    On a quadratic c_i is <grad, e_i> exactly, whatever mu.
    """

    @property
    def probes(self) -> list[Probe]:
        return [(i, sign) for i in range(self.count) for sign in (1.0, -1.0)]

    def coefficients(self, losses: Tensor) -> Tensor:
        return (losses[0::2] - losses[1::2]) / (2 * self.step_size)


class OnePointEstimator(FiniteDifferenceEstimator):
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
