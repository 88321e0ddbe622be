"""Zeroth-order gradients for a LightningModule of one's own: `zo_backward` where `manual_backward` was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mep_lightning.distributed import Ranks
from mep_lightning.errors import UserError
from mep_lightning.estimators.perturbation import ROUNDING, Probe, combine, displaced
from mep_lightning.estimators.zeroth_order import FiniteDifferenceEstimator, SPSAEstimator
from mep_lightning.kernels.tf32 import whole_products


@contextmanager
def displaced_in_place(
    params: Mapping[int, Tensor], probe: Probe, mu: float, seed: int, step: int, originals: Sequence[Tensor]
) -> Iterator[None]:
    """Move parameters to a member for the body, then copy the originals back: adding and subtracting would drift."""
    try:
        for (param_id, param), original in zip(params.items(), originals, strict=True):
            param.copy_(displaced(original, probe, mu, seed, step, param_id))
        yield
    finally:
        for param, original in zip(params.values(), originals, strict=True):
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
    _zo_moved: int = 0
    _zo_met: int = 0

    @torch.no_grad()
    def zo_backward(
        self,
        loss_fn: Callable[[], Tensor],
        params: Iterable[Tensor],
        estimator: FiniteDifferenceEstimator | None = None,
    ) -> dict[str, Tensor]:
        """Estimate the gradient of a loss and add it to `.grad`, as `backward` would, with forward passes only.

        The members are evaluated one after the other with the parameters changed in place; afterwards these are bitwise
        what they were, also when the loss raises. Every member sees the same of torch's random numbers, so the loss may
        draw its noise and timesteps itself. Autocast is off meanwhile, as it would round differences away. The
        directions are a pure function of the estimator's seed, of `global_step` and of what earlier calls of the same
        step perturbed, so a resumed run repeats them; a module without a `global_step` counts its calls instead.

        Over several processes each has data of its own, and the mean of their losses makes one gradient for all; what
        is trained begins as the first has it.

        Args:
            loss_fn: () -> scalar.
            params: what to perturb; floating point, any dtype and shape, though mu drowns in half precision; those that
                require no gradient are left alone. A copy of all of them is held meanwhile.
            estimator: one of finite differences; `SPSAEstimator(n=1, mu=1e-3)` by default.

        Returns:
            {"loss": their mean, scalar, "losses": one a member, [V]}.

        Raises:
            UserError: no parameter requires a gradient, the loss is no scalar, the estimator is of another kind, or the
                Trainer scales losses (16-mixed), which these gradients know nothing of.
        """
        estimator = SPSAEstimator() if estimator is None else estimator
        if not isinstance(estimator, FiniteDifferenceEstimator):
            raise UserError(
                f"zo_backward moves parameters in place, which {type(estimator).__name__} does not: take "
                "SPSAEstimator, or call its estimate()"
            )
        trainer = getattr(self, "_trainer", None)
        if getattr(getattr(trainer, "precision_plugin", None), "scaler", None) is not None:
            raise UserError(
                "a Trainer of precision 16-mixed divides gradients by its losses' scale, which zo_backward does not "
                "know: take bf16-mixed, or 32-true"
            )
        trained = [param for param in dict.fromkeys(params) if param.requires_grad]  # a tied parameter is moved once
        if not trained:
            raise UserError("zo_backward got no parameter that requires a gradient: set requires_grad on what to train")
        ranks = Ranks.of(trainer)
        if self._zo_met != ranks.world:
            self._meet(ranks, trained, estimator)
        step, first = self._next_directions(len(trained))
        numbered = dict(enumerate(trained, start=first))  # parameter id -> parameter
        seed, mu = estimator.seed or 0, estimator.step_size
        originals = [param.detach().clone() for param in trained]
        losses = []
        devices = [param.device for param in trained]
        whole = torch.autocast(devices[0].type, enabled=False)
        with same_random_numbers(devices) as rewind, whole_products(), whole:
            for probe in estimator.probes:
                rewind()
                with displaced_in_place(numbered, probe, mu, seed, step, originals):
                    losses.append(_scalar(loss_fn()))
        stacked = ranks.averaged_(torch.stack(losses))  # [V]
        weights = estimator.weights(stacked, dims=sum(param.numel() for param in trained))
        for param_id, param in numbered.items():
            grad = combine(weights.to(param.device), param, seed, step, param_id)
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        return {"loss": stacked.mean(), "losses": stacked}

    def _meet(self, ranks: Ranks, trained: Sequence[Tensor], estimator: FiniteDifferenceEstimator) -> None:
        """What the first call sees to: processes begin alike, and a mu that drowns is told."""
        self._zo_met = ranks.world
        for param in trained:
            param.copy_(ranks.agreed(param))
        dtype = max((param.dtype for param in trained), key=lambda dtype: ROUNDING.get(dtype, 0.0))
        name = str(dtype).removeprefix("torch.")
        if estimator.step_size < ROUNDING.get(dtype, 0.0):
            rank_zero_warn(
                f"mu {estimator.step_size:g} drowns in {name} parameters, which round most of it "
                "away: train parameters in fp32; the model may be in half precision"
            )

    def _next_directions(self, count: int) -> tuple[int, int]:
        """The step that the noise belongs to, and the first of `count` parameter ids not used in it yet."""
        step = int(getattr(self, "global_step", self._zo_step + 1))
        if step != self._zo_step:
            self._zo_step, self._zo_moved = step, 0
        first, self._zo_moved = self._zo_moved, self._zo_moved + count
        return step, first


def _scalar(loss: Tensor | float) -> Tensor:
    """One loss, in fp32 at least, so that differences are not rounded."""
    loss = torch.as_tensor(loss)
    if loss.numel() != 1:
        raise UserError(f"loss_fn must answer with a scalar, such as a mean, not with {list(loss.shape)}")
    return loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
