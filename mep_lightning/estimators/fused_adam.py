"""Adam that also takes zeroth-order gradients: noise again from its seed, gradient, projection and update in one go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from mep_lightning.estimators.perturbation import DRAWN_AHEAD
from mep_lightning.kernels import philox_normals, subspace_project_, zo_step_

ALONE = 4
"""Parameters up to which each has its own launch on a CPU; more are updated together."""


@dataclass(frozen=True)
class _Told:
    """What the losses said about a parameter's directions."""

    weights: Tensor
    seed: int
    step: int
    param_id: int
    basis: Tensor | None
    keep: bool
    along: Tensor | None


class FusedZOAdam(Adam):
    """`torch.optim.Adam`, to which a gradient may also be told by what the losses said about each direction.

    `receive` what an estimator's `weigh` answered, then `step`: parameters that were told of are updated by
    `kernels.zo_step_` (or, with directions of one's own, by a gradient made of them), those with a `grad` as ever,
    with the same state. A checkpoint of either optimizer is read by the other.

    Args:
        params: what is trained, in fp32.
        lr, betas, eps, weight_decay, fused: Adam's; `fused` is for gradients that autograd made.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self._told: dict[Tensor, _Told] = {}
        self._left: dict[Tensor, tuple[Tensor, int]] = {}  # gradients to be looked at, and their versions
        self._clocks: dict[Tensor, tuple[Tensor, Tensor]] = {}  # step and pace, on each parameter's device
        self._counts: dict[Tensor, int] = {}  # of updates so far: state["step"], which a GPU may hold

    def receive(
        self,
        theta: Tensor,
        weights: Tensor,
        seed: int,
        step: int,
        param_id: int,
        basis: Tensor | None = None,
        keep_grad: bool = True,
        along: Tensor | None = None,
    ) -> None:
        """What the next `step` makes theta's gradient from.

        Args:
            theta: one of the parameters.
            weights: [n], the gradient is sum_i weights_i e_i.
            seed, step, param_id: of the directions e_i, as in `philox_normal`; an id belongs to one parameter.
            basis: P [k, d], what is projected out of it.
            keep_grad: whether the projected gradient is left in `theta.grad`.
            along: the directions themselves, fp32 [n, d], where they are not those of (seed, step, param_id).
        """
        self._told[theta] = _Told(weights, seed, step, param_id, basis, keep_grad, along)

    @property
    def told(self) -> list[Tensor]:
        """What the next `step` was told of directions: weights [n], each that differs once."""
        return list({id(this.weights): this.weights for this in self._told.values()}.values())

    def forget(self) -> None:
        """Let the next `step` know nothing of what it was told."""
        self._told.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Adam's."""
        super().load_state_dict(state_dict)
        self.recount()

    def recount(self) -> None:
        """Read the number of updates from the state again, which somebody else has written."""
        self._counts.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update what `receive` was told of since the last step, and what has a `grad`; other parameters stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kind = next((theta.device.type for theta, _ in self._all()), "cpu")
        with torch.autocast(kind, enabled=False):  # a Trainer's would round gradients that are made of directions
            self._step()
        return loss

    def _step(self) -> None:
        for theta, (left, version) in self._left.items():
            if theta.grad is left and left._version == version:  # an earlier step's, to which nothing was added
                theta.grad = None
        told = {theta: (self._told.pop(theta), group) for theta, group in self._all() if theta in self._told}
        drawn = {theta: this for theta, (this, _) in told.items() if this.along is None}
        alone = len(drawn) <= ALONE or next(iter(drawn)).is_cuda or not _are_drawn_together(drawn)
        updated = drawn if alone else {}
        for theta, this in updated.items():
            self._update(theta, this, told[theta][1])
        self._give_gradients({theta: this for theta, (this, _) in told.items() if theta not in updated})
        made = {theta: theta.grad for theta in told}
        for theta in updated:
            theta.grad = None  # it is applied
        self._take_gradients()
        self._left = {}
        for theta, grad in made.items():
            theta.grad = grad if told[theta][0].keep else None
            if theta.grad is not None:
                self._left[theta] = theta.grad, theta.grad._version

    def _take_gradients(self) -> None:
        """Adam's own step, of what has a `grad`."""
        for theta in self._counts:
            self._counts[theta] += theta.grad is not None
        super().step()

    def _all(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(theta, group) for group in self.param_groups for theta in group["params"]]

    def _give_gradients(self, told: dict[Tensor, _Told]) -> None:
        """The gradients of parameters whose directions are there, and of many others, drawn in few sweeps."""
        n = max((len(this.weights) for this in told.values()), default=0)
        waiting = []
        for theta, this in told.items():
            if this.along is None:
                waiting.append((theta, this))
            else:
                theta.grad = (this.weights.float() @ this.along).view(theta.shape).to(theta.dtype)
                if this.basis is not None:
                    subspace_project_(theta.grad, this.basis)
        while waiting:
            together: list[tuple[Tensor, _Told]] = []
            while waiting and (not together or n * sum(theta.numel() for theta, _ in together) < DRAWN_AHEAD):
                together.append(waiting.pop())
            theta, this = together[0]  # all are told of by the same losses
            sizes = {one.param_id: like.numel() for like, one in together}
            noises = philox_normals(this.seed, this.step, range(n), sizes, theta.device)
            for theta, one in together:
                theta.grad = (one.weights.float() @ noises[one.param_id]).view(theta.shape).to(theta.dtype)

    def _update(self, theta: Tensor, told: _Told, group: dict[str, Any]) -> None:
        state, device = self.state[theta], theta.device
        if not state:
            place = device if group["fused"] or group["capturable"] else "cpu"  # where Adam looks for it
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(theta, dtype=torch.float32) for _ in range(2))
        if theta not in self._counts:
            self._counts[theta] = int(state["step"])
        state["step"] += 1
        self._counts[theta] += 1
        lr, betas, count = group["lr"], group["betas"], self._counts[theta]
        if theta not in self._clocks or self._clocks[theta][0].device != device:
            now = torch.empty(1, device=device, dtype=torch.int64)
            self._clocks[theta] = now, torch.empty(2, device=device, dtype=torch.float32)
        now, pace = self._clocks[theta]
        now.fill_(told.step)  # filled on the device: a copy from the host would wait for it
        pace[0].fill_(lr / (1 - betas[0] ** count))
        pace[1].fill_(math.sqrt(1 - betas[1] ** count))
        theta.grad = torch.empty_like(theta) if told.keep else None
        zo_step_(
            theta,
            told.weights.float(),
            state["exp_avg"],
            state["exp_avg_sq"],
            now,
            pace,
            told.seed,
            told.param_id,
            betas,
            group["eps"],
            group["weight_decay"],
            told.basis,
            theta.grad,
        )


def _are_drawn_together(told: dict[Tensor, _Told]) -> bool:
    """Whether parameters' directions come from one draw, in which each has its own number, and nothing is projected."""
    draws = {(this.seed, this.step) for this in told.values()}
    numbers = {this.param_id for this in told.values()}
    return len(draws) == 1 and len(numbers) == len(told) and all(this.basis is None for this in told.values())
