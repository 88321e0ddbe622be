"""Partial Uniform Timestep Sampling (ZOODiP, arXiv 2503.14868) for any module that has a `timesteps` attribute."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from mep_lightning import defaults
from mep_lightning.errors import UserError
from mep_lightning.timesteps import PartialUniformTimesteps


class PUTS(Callback):
    """Train on t ~ U{low .. high - 1} alone, where the text embedding has its say.

    Args:
        low: T_L, the first timestep drawn, or "auto": what `defaults` holds for the module's method and base.
        high: T_U, the first timestep above those drawn, or "auto".

    After `fit` has started, `low` and `high` are numbers.

    Raises:
        UserError: bounds that hold no timestep or leave the schedule, a module without `timesteps`, or "auto" with a
            module or method that has no defaults.
    """

    AUTO: ClassVar[dict[str, str]] = {"low": "puts_low", "high": "puts_high"}

    def __init__(self, low: int | Literal["auto"] = "auto", high: int | Literal["auto"] = "auto") -> None:
        self.low, self.high = low, high
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
        if self.low == "auto" or self.high == "auto":
            values = _defaults(pl_module)
            self.low = values["puts_low"] if self.low == "auto" else self.low
            self.high = values["puts_high"] if self.high == "auto" else self.high
        _check(self.low, self.high)
        scheduler = getattr(getattr(pl_module, "base", None), "scheduler", None)
        total = len(scheduler.alphas_cumprod) if scheduler is not None else None
        if total is not None and self.high > total:
            raise UserError(
                f"PUTS high is {self.high}, but the base has {total} timesteps: set high to {total} or less."
            )
        pl_module.timesteps = PartialUniformTimesteps(self.low, self.high)


def _defaults(module: LightningModule) -> dict[str, Any]:
    """The default values of a module's method on its base, with PUTS bounds among them."""
    method: Any = getattr(module, "method", None)
    base: Any = getattr(module, "base", None)
    values = {}
    if isinstance(method, str) and hasattr(base, "family"):
        values = defaults.lookup(method, base.family, base.precision)
    if "puts_low" not in values or "puts_high" not in values:
        raise UserError(
            f"No PUTS bounds are known for {method or type(module).__name__}: write them, such as PUTS(500, 900)."
        )
    return values


def _check(low: int, high: int) -> None:
    if low >= high:
        raise UserError(f"PUTS low ({low}) is not below high ({high}), so no timestep is left: set low below high.")
