"""Partial Uniform Timestep Sampling (ZOODiP, arXiv 2503.14868) for any module that has a `timesteps` attribute."""

from __future__ import annotations

from typing import Any, ClassVar, Literal
from weakref import WeakSet

from lightning.pytorch import Callback, Trainer

from mep_lightning import defaults
from mep_lightning.errors import UserError
from mep_lightning.timesteps import PartialUniformTimesteps, TimestepSampler, UniformTimesteps

_MADE: WeakSet[TimestepSampler] = WeakSet()
"""Samplers that PUTS has given to modules, and replaces in a later fit."""


class PUTS(Callback):
    """Train on t ~ U{low .. high - 1} alone, where the text embedding has its say.

    Args:
        low: T_L, the first timestep drawn, or "auto": what `defaults` holds for the module's method and base.
        high: T_U, the first timestep above those drawn, or "auto".

    After `fit` has started, `low` and `high` are numbers.

    Raises:
        UserError: bounds that hold no timestep or leave the schedule, a module without `timesteps` or with a sampler
            that narrows or weights them itself, or "auto" with a module or method that has no defaults.
    """

    AUTO: ClassVar[dict[str, str]] = {"low": "puts_low", "high": "puts_high"}

    def __init__(self, low: int | Literal["auto"] = "auto", high: int | Literal["auto"] = "auto") -> None:
        self.low, self.high = low, high
        self._asked = low, high
        if low != "auto" and low < 0:
            raise UserError(f"PUTS low is {low}: set it to 0 or more.")
        if low != "auto" and high != "auto":
            _check(low, high)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Replace the module's sampler, once its base is there to ask for bounds."""
        if not hasattr(pl_module, "timesteps"):
            raise UserError(
                f"PUTS needs a module that draws its timesteps from `self.timesteps`; {type(pl_module).__name__} has no"
                " such attribute: set one in __init__ or leave PUTS out."
            )
        sampler = pl_module.timesteps
        was_asked_for = isinstance(sampler, TimestepSampler) and sampler not in _MADE
        if was_asked_for and not isinstance(sampler, UniformTimesteps):
            name = type(sampler).__name__
            raise UserError(f"PUTS and the module's {name} both say which timesteps are drawn: leave one of them out.")
        self.low, self.high = self._asked  # an earlier fit, maybe on another base, has put numbers there
        defaults.fill_in(self, defaults.of(pl_module), getattr(pl_module, "method", None) or type(pl_module).__name__)
        assert isinstance(self.low, int) and isinstance(self.high, int)
        _check(self.low, self.high)
        scheduler = getattr(getattr(pl_module, "base", None), "scheduler", None)
        total = len(scheduler.alphas_cumprod) if scheduler is not None else None
        if total is not None and self.high > total:
            raise UserError(
                f"PUTS high is {self.high}, but the base has {total} timesteps: set high to {total} or less."
            )
        pl_module.timesteps = PartialUniformTimesteps(self.low, self.high)
        _MADE.add(pl_module.timesteps)


def _check(low: int, high: int) -> None:
    if low >= high:
        raise UserError(f"PUTS low ({low}) is not below high ({high}), so no timestep is left: set low below high.")
