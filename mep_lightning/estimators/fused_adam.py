"""Adam for zeroth-order gradients: noise again from its seed, gradient, projection and update in one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mep_lightning.kernels import zo_step_


@dataclass(frozen=True)
class _Told:
    """What the losses said about a parameter's directions."""

    weights: Tensor
    seed: int
    step: int
    param_id: int
    basis: Tensor | None


class FusedZOAdam(Optimizer):
    """Adam that makes its gradients itself, from what the losses said about each direction (`kernels.zo_step_`).

    `receive` what an estimator's `weigh` answered, then `step`. The projected gradient is left in `grad`. State is that
    of `torch.optim.Adam`, so a checkpoint of either is read by the other.

    Args:
        params: what is trained, in fp32.
        lr, betas, eps, weight_decay: Adam's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._told: dict[Tensor, _Told] = {}
        self._clocks: dict[Tensor, tuple[Tensor, Tensor]] = {}  # step and pace, on each parameter's device

    def receive(
        self, theta: Tensor, weights: Tensor, seed: int, step: int, param_id: int, basis: Tensor | None = None
    ) -> None:
        """What the next `step` makes theta's gradient from.

        Args:
            theta: one of the parameters.
            weights: [n], the gradient is sum_i weights_i e_i.
            seed, step, param_id: of the directions e_i, as in `philox_normal`; an id belongs to one parameter.
            basis: P [k, d], what is projected out of it.
        """
        self._told[theta] = _Told(weights, seed, step, param_id, basis)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update what `receive` was told of since the last step; other parameters stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if (told := self._told.pop(theta, None)) is not None:
                    self._update(theta, told, group)
        return loss

    def _update(self, theta: Tensor, told: _Told, group: dict[str, Any]) -> None:
        state, device = self.state[theta], theta.device
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(theta, dtype=torch.float32) for _ in range(2))
        state["step"] += 1
        lr, betas, count = group["lr"], group["betas"], int(state["step"])
        if theta not in self._clocks or self._clocks[theta][0].device != device:
            now = torch.empty(1, device=device, dtype=torch.int64)
            self._clocks[theta] = now, torch.empty(2, device=device, dtype=torch.float32)
        now, pace = self._clocks[theta]
        now.fill_(told.step)  # filled on the device: a copy from the host would wait for it
        pace[0].fill_(lr / (1 - betas[0] ** count))
        pace[1].fill_(math.sqrt(1 - betas[1] ** count))
        theta.grad = torch.empty_like(theta) if theta.grad is None else theta.grad
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
