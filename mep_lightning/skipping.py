"""Steps whose loss or gradient is not finite: they change nothing, are counted, and many in a row end the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimators import Estimator, FusedZOAdam

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule

MOST = 20
"""Skipped steps in a row after which the training stops: a value that has run away does not come back by itself."""


@dataclass
class Skipped:
    """How many steps were skipped, in the whole run and in a row up to now."""

    total: int = 0
    in_a_row: int = 0

    @classmethod
    def from_checkpoint(cls, saved: object) -> Skipped:
        """Those that a checkpoint counts; none in one from before they were counted.

        Raises:
            CheckpointError: they are no counts.
        """
        counts = [0, 0] if saved is None else saved
        if not (isinstance(counts, list) and len(counts) == 2 and all(type(one) is int and one >= 0 for one in counts)):
            raise CheckpointError(f"the checkpoint's mep.skipped is {saved!r}: it is damaged, start from another one")
        return cls(*counts)

    def note(self, is_sound: bool, step: int) -> None:
        """Count a step, which was skipped unless it is sound.

        Args:
            is_sound: what `is_sound` answered.
            step: its number, from 0.

        Raises:
            UserError: too many in a row were skipped.
        """
        if is_sound:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.total == 1:
            rank_zero_warn(
                f"step {step} was skipped: its loss or gradient is not finite; further ones are counted in the log"
            )
        if self.in_a_row >= MOST:
            raise UserError(
                f"{MOST} steps in a row up to step {step} had a loss or gradient that is not finite and were skipped: "
                "begin a new run with a lower model.lr, or with fp32 in model.precision or model.activations"
            )


def is_sound(estimator: Estimator, losses: Tensor, optimizer: Optimizer, grads: Sequence[Tensor], norm: Tensor) -> bool:
    """Whether an optimizer may take what a step has given it; the same on all ranks, which hold the same.

    Args:
        estimator: the step's.
        losses: of its members, [V].
        optimizer: holds what the losses said of the directions, where there are no gradients yet.
        grads: what is there of gradients.
        norm: theirs, together.
    """
    if estimator.moves_itself:  # a search that passes over members without a loss
        return bool(losses.isfinite().any() & norm.isfinite())
    told = optimizer.told if isinstance(optimizer, FusedZOAdam) else []
    numbers = [losses.flatten(), *([norm.flatten()] if grads else []), *told]
    return bool(torch.cat([one.float() for one in numbers]).isfinite().all())  # one look at a GPU


def skip(optimizer: Optimizer) -> None:
    """Take from an optimizer all that it was given, so that its next step changes neither values nor moments."""
    optimizer.zero_grad()
    if isinstance(optimizer, FusedZOAdam):
        optimizer.forget()


def gradients(module: PersonalizationModule) -> list[Tensor]:
    """Those that are there."""
    return [theta.grad for theta in module.adapter.numbered().values() if theta.grad is not None]


def norm_of(grads: Sequence[Tensor]) -> Tensor:
    """Of all together; NaN where there are none."""
    return torch.nn.utils.get_total_norm(grads) if grads else torch.tensor(math.nan)
