"""Partial Uniform Timestep Sampling (ZOODiP, section 4.3) for any module that has a `timesteps` attribute."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from mep_lightning.errors import UserError
from mep_lightning.timesteps import PartialUniformTimesteps


class PUTS(Callback):
    """Train on t ~ U{low .. high - 1} alone, where the text embedding has its say.

    Args:
        low: T_L, the first timestep drawn, or "auto": the module's own `puts_bounds`.
        high: T_U, the first timestep above those drawn, or "auto".

    Raises:
        UserError: bounds that hold no timestep or leave the schedule, a module without `timesteps`, or "auto" with a
            module that has no `puts_bounds`.
    """

    def __init__(self, low: int | Literal["auto"] = "auto", high: int | Literal["auto"] = "auto") -> None:
        self.low, self.high = low, high
        if low != "auto" and low < 0:
            raise UserError(f"PUTS low is {low}: set it to 0 or more.")
        if low != "auto" and high != "auto":
            _check(low, high)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the module's sampler, once its base is there to ask for bounds."""
        if not hasattr(pl_module, "timesteps"):
            raise UserError(
                f"PUTS needs a module that draws its timesteps from `self.timesteps`; {type(pl_module).__name__} has no"
                " such attribute: set one in __init__ or leave PUTS out."
            )
        if self.low == "auto" or self.high == "auto":
            bounds = getattr(pl_module, "puts_bounds", None)
            if bounds is None:
                raise UserError(
                    f"{type(pl_module).__name__} has no `puts_bounds` to fill PUTS' auto in: write PUTS(low, high)."
                )
            self.low = bounds[0] if self.low == "auto" else self.low
            self.high = bounds[1] if self.high == "auto" else self.high
        _check(self.low, self.high)
        scheduler = getattr(getattr(pl_module, "base", None), "scheduler", None)
        total = len(scheduler.alphas_cumprod) if scheduler is not None else None
        if total is not None and self.high > total:
            raise UserError(f"PUTS high is {self.high}, but the base has {total} timesteps: set high to {total} or less.")
        pl_module.timesteps = PartialUniformTimesteps(self.low, self.high)


def _check(low: int, high: int) -> None:
    if low >= high:
        raise UserError(f"PUTS low ({low}) is not below high ({high}), so no timestep is left: set low below high.")
