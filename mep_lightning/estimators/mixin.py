"""Zeroth-order gradients for a LightningModule of one's own: `zo_backward` where `manual_backward` was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mep_lightning.estimators.perturbation import Probe, combine, displaced
from mep_lightning.estimators.zeroth_order import SPSAEstimator, ZerothOrderEstimator


@contextmanager
def displaced_in_place(
    params: Sequence[Tensor], probe: Probe, mu: float, seed: int, step: int, originals: Sequence[Tensor]
) -> Iterator[None]:
    """Move parameters to a member for the body, then copy the originals back: adding and subtracting would drift."""
    try:
        for param_id, (param, original) in enumerate(zip(params, originals, strict=True)):
            param.copy_(displaced(original, probe, mu, seed, step, param_id))
        yield
    finally:
        for param, original in zip(params, originals, strict=True):
            param.copy_(original)


@contextmanager
def same_random_numbers(devices: Iterable[torch.device]) -> Iterator[Callable[[], None]]:
    """Yields a function that takes the global generators back to where they stand now."""
    gpus = sorted({device.index for device in devices if device.type == "cuda" and device.index is not None})
    cpu_state = torch.get_rng_state()
    gpu_states = [torch.cuda.get_rng_state(gpu) for gpu in gpus]

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        for gpu, state in zip(gpus, gpu_states, strict=True):
            torch.cuda.set_rng_state(state, gpu)

    yield rewind


class ZerothOrderMixin:
    """Adds `zo_backward` to a module that optimises manually.

    Example:
        class MyModule(ZerothOrderMixin, LightningModule):  # automatic_optimization = False
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                losses = self.zo_backward(lambda: self.loss(batch), self.adapter.parameters())
                optimizer.step()
    """

    _zo_step: int = -1

    @torch.no_grad()
    def zo_backward(
        self,
        loss_fn: Callable[[], Tensor],
        params: Iterable[Tensor],
        estimator: ZerothOrderEstimator | None = None,
    ) -> dict[str, Tensor]:
        """Estimate the gradient of a loss and add it to `.grad`, as `backward` would, with forward passes only.

        The members are evaluated one after the other with the parameters changed in place; afterwards these are bitwise
        what they were, also when the loss raises. Every member sees the same random numbers, so the loss may draw its
        noise and timesteps itself. The directions are those of `global_step`, or, where that stands still, one past the
        last call's.

        Args:
            loss_fn: () -> scalar.
            params: what to perturb; floating point, any dtype and shape. A copy of all of them is held meanwhile.
            estimator: a zeroth-order one; `SPSAEstimator(n=1, mu=1e-3)` by default.

        Returns:
            {"loss": their mean, scalar, "losses": one a member, [V]}.
        """
        estimator = SPSAEstimator() if estimator is None else estimator
        params = list(dict.fromkeys(params))  # a tied parameter is moved once
        step = self._next_zo_step()
        seed, mu = estimator.seed or 0, estimator.step_size
        originals = [param.detach().clone() for param in params]
        losses = []
        with same_random_numbers(param.device for param in params) as rewind:
            for probe in estimator.probes:
                rewind()
                with displaced_in_place(params, probe, mu, seed, step, originals):
                    losses.append(torch.as_tensor(loss_fn(), dtype=torch.float32).detach())
        stacked = torch.stack(losses)  # [V]
        weights = estimator.weights(stacked, dims=sum(param.numel() for param in params))
        for param_id, param in enumerate(params):
            grad = combine(weights.to(param.device), param, seed, step, param_id)
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        return {"loss": stacked.mean(), "losses": stacked}

    def _next_zo_step(self) -> int:
        self._zo_step = max(self._zo_step + 1, int(getattr(self, "global_step", 0)))
        return self._zo_step
