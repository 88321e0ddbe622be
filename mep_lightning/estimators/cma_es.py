"""Search without a gradient: CMA-ES over a few directions of the vocabulary (gradient-free textual inversion).

Fei et al. 2023, arXiv 2304.05818: a token is init + z A, where the rows of A are principal components of the
vocabulary's embeddings, and z in R^dims is what CMA-ES (the package `cma`) searches. Here a component is as long as the
vocabulary's standard deviation along it, so that sigma 1 draws tokens about as far from init as words are apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mep_lightning.errors import SEEDS, CheckpointError, UserError, refuse_unless
from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.kernels import philox_normal


class CMAES(Estimator):
    """Draws a population, hears its losses, and answers with the way to its new mean: theta - grad, exactly one step.

    Its state is what it was told: a resumed search draws and tells the same populations again.

    Args:
        population: how many tokens a step evaluates, in one batch; "auto" is what a module takes from its defaults.
        dims: of the search, at most those of the embeddings, for each vector of the token; "auto" as for population.
        sigma: the first standard deviation, in units of the vocabulary's; "auto" as for population.
        seed: of the populations; None takes the module's, or 0 where there is none.

    Raises:
        UserError: a setting out of range, or `cma` is not installed.
    """

    forward_only = True
    moves_itself = True
    AUTO: ClassVar[dict[str, str]] = {"population": "population", "dims": "dims", "sigma": "sigma"}

    def __init__(
        self,
        population: int | Literal["auto"] = "auto",
        dims: int | Literal["auto"] = "auto",
        sigma: float | Literal["auto"] = "auto",
        seed: int | None = None,
    ) -> None:
        for name, value, least in (("population", population, 4), ("dims", dims, 2)):
            fine = value == "auto" or (isinstance(value, int) and value >= least)
            refuse_unless(fine, f"CMAES.{name}", value, f"{least} or more, or auto")
        fine = sigma == "auto" or (isinstance(sigma, (int, float)) and 0 < sigma < float("inf"))
        refuse_unless(fine, "CMAES.sigma", sigma, "a number above 0, or auto")
        refuse_unless(seed is None or 0 <= seed < SEEDS, "CMAES.seed", seed, f"0 to {SEEDS - 1}")
        try:
            import cma  # noqa: F401
        except ImportError:
            raise UserError("CMAES needs the package cma: pip install 'mep-lightning[gf-ti]'") from None
        self.population, self.dims, self.sigma, self.seed = population, dims, sigma, seed
        self._vocabulary: Callable[[], Tensor] | None = None
        self._start: Tensor | None = None
        self._basis: Tensor | None = None
        self._heard: list[Tensor] = []
        self._search: Any = None
        self._drawn: list[Any] | None = None

    def __copy__(self) -> CMAES:
        """A search of its own, from where this one stands."""
        made = object.__new__(type(self))
        made.__dict__ |= self.__dict__ | {"_heard": list(self._heard), "_search": None, "_drawn": None}
        return made

    @property
    def members(self) -> int:
        if self.population == "auto":
            raise UserError("CMAES.population is 'auto' outside a module; set it, such as population=20")
        return int(self.population)

    def begin(self, adapter: Any, base: Any) -> None:
        held = weakref.ref(base)  # a base that is replaced must not be held here
        self.follow(lambda: adapter.vocabulary(held()))

    def follow(self, vocabulary: Callable[[], Tensor]) -> None:
        """What the search's directions come from: answers embeddings [N, D] of words, once they are needed."""
        self._vocabulary = vocabulary

    @torch.no_grad()
    def estimate(self, loss_fn: LossFn, theta: Tensor, step: int = 0, dims: int | None = None) -> tuple[Tensor, Tensor]:
        """As `Estimator.estimate`, with theta [vectors, D]; `step` and `dims` change nothing.

        A population of which no member has a finite loss is neither told nor kept: the next step evaluates it again,
        over another noise and timestep, so that what was heard stays all that a resumed search needs.
        """
        if self._search is None:
            self._begin(theta, self.members)
        if self._drawn is None:
            self._drawn = self._search.ask()
        losses = loss_fn(self._tokens(np.stack(self._drawn), theta)).float()  # [V]
        heard = losses.cpu()
        if heard.isfinite().any():
            worst = heard[heard.isfinite()].max()
            self._heard.append(torch.where(heard.isfinite(), heard, worst))
            self._tell(self._drawn, self._heard[-1])
            self._drawn = None
        (mean,) = self._tokens(self._search.mean[None], theta)
        return theta - mean, losses

    def _begin(self, theta: Tensor, population: int) -> None:
        """At theta, or where what was heard already has led to."""
        import cma

        if self._start is None or self._basis is None:
            self._start = theta.detach().float().cpu().clone()
            self._basis = self._principal(theta.shape[-1])
        size = len(self._start) * len(self._basis)
        options = {
            "popsize": population,
            "randn": self._normals,
            "seed": np.nan,  # numpy's own generator is left alone
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "maxiter": np.inf,
        }
        self._generation = 0
        self._search = cma.CMAEvolutionStrategy(np.zeros(size), float(self.sigma), options)
        for losses in self._heard:
            self._tell(self._search.ask(), losses)

    def _normals(self, count: int, size: int) -> Any:
        wanted = range(count)
        return philox_normal(self.seed or 0, self._generation, wanted, 0, size).double().numpy()

    def _tell(self, drawn: list[Any], losses: Tensor) -> None:
        self._search.tell(drawn, losses.double().tolist())
        self._generation += 1

    def _tokens(self, z: Any, theta: Tensor) -> Tensor:
        """z [V, vectors * dims] -> tokens [V, vectors, D] in theta's dtype, on its device."""
        assert self._start is not None and self._basis is not None
        moved = torch.from_numpy(z).float().unflatten(1, (len(self._start), -1)) @ self._basis
        return (self._start + moved).to(theta)

    def _principal(self, width: int) -> Tensor:
        """[dims, D]: the components along which words differ most, each as long as their standard deviation there."""
        if self._vocabulary is None:
            raise UserError("CMAES searches among a vocabulary's components: call follow() with its embeddings")
        if self.dims == "auto" or self.sigma == "auto":
            raise UserError("CMAES.dims or sigma is 'auto' outside a module; set them, such as dims=256, sigma=1.0")
        words = self._vocabulary().detach().cpu().double()
        variances, components = torch.linalg.eigh(torch.cov(words.T))
        count = min(int(self.dims), width)
        lengths = variances[-count:].clamp_min(0).sqrt()
        return (components[:, -count:] * lengths).T.flip(0).float().contiguous()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs, as tensors."""
        heard = torch.stack(self._heard) if self._heard else torch.zeros(0, self.members)
        return {"start": self._start, "basis": self._basis, "heard": heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is another estimator's, or damaged.
        """
        if lacking := {"start", "basis", "heard"} - state.keys():
            raise CheckpointError(f"the state of the search lacks {', '.join(sorted(lacking))}: start the run anew")
        self._start, self._basis, self._heard = state["start"], state["basis"], list(state["heard"])
        self._search = self._drawn = None
