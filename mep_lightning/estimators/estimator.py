"""The contract of every gradient estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from mep_lightning.errors import CheckpointError

LossFn = Callable[[Tensor], Tensor]
"""[V, *theta.shape] -> [V]: the loss of every member, over the same data, noise and timestep."""


class Estimator(ABC):
    """Asks a loss about some members (points near theta) and answers with a gradient."""

    forward_only: ClassVar[bool]
    """Whether the loss is evaluated without autograd."""

    moves_itself: ClassVar[bool] = False
    """Whether theta - grad is where theta goes: an optimizer then takes just that step."""

    seed: int | None = None
    """What the directions are drawn from; None is the owning module's to fill in, and 0 where there is none."""

    def begin(self, adapter: Any, base: Any) -> None:
        """Look at what will be trained, once it is attached to its base, and before the first step."""
        return  # most need not

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside (seed, step), as tensors and plain values: nothing, mostly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` answered.

        Raises:
            CheckpointError: it is another estimator's.
        """
        if state:
            raise CheckpointError(f"{type(self).__name__} keeps no state, and was given {', '.join(state)}")

    @property
    @abstractmethod
    def members(self) -> int:
        """V, how many points one estimate evaluates."""

    @abstractmethod
    def estimate(self, loss_fn: LossFn, theta: Tensor, step: int = 0, dims: int | None = None) -> tuple[Tensor, Tensor]:
        """Estimate the gradient of the loss at theta.

        Args:
            loss_fn: [V, *theta.shape] -> [V]; called once, with all members together.
            theta: any shape.
            step: the same (seed, step) gives the same directions.
            dims: d, the dimensions left after projection; `theta.numel()` by default.

        Returns:
            The gradient in theta's shape and dtype, and the losses [V].
        """
