"""Forward gradients (Baydin et al. 2022, arXiv 2202.08587): exact derivatives along random directions.

A finite difference subtracts two nearly equal losses, and what half precision dropped of them is divided by mu. Here
each direction's derivative is carried through the network as a tangent beside the value: forward passes only, no
activation is kept, there is no mu, and rounding stays as small as in the forward pass itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mep_lightning.errors import UserError
from mep_lightning.estimators.perturbation import TANGENT, Tangents
from mep_lightning.estimators.zeroth_order import ZerothOrderEstimator
from mep_lightning.tangents import Dual


class ForwardGradientEstimator(ZerothOrderEstimator):
    """c_i = <grad L(theta), e_i>, the limit of RGE for mu -> 0: one member, whose n tangents are as many rows more.

    Args:
        n, normalize, seed, standardize: as of `ZerothOrderEstimator`.

    Raises:
        NoRuleError: the loss function computes something whose derivative is unknown (`tangents.rule`).
    """

    def __init__(
        self,
        n: int | Literal["auto"] = 2,
        normalize: bool = False,
        seed: int | None = None,
        standardize: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(n, normalize, seed, standardize)

    @property
    def members(self) -> int:
        return 1

    def around(self, step: int) -> Tangents:
        return Tangents(seed=self.seed or 0, step=step, n=self.count)

    @property
    def answers(self) -> int:
        return 1 + self.count

    @property
    def shares(self) -> int:
        return self.count

    def heard(self, losses: Tensor, members: int) -> Tensor:
        """The loss and its derivative along every direction, [1 + n].

        Raises:
            UserError: what was answered is not one loss, or nothing that the directions reach.
        """
        if not isinstance(losses, Dual):
            raise UserError("loss_fn answered without tangents: what it computes does not depend on what is trained")
        heard = super().heard(losses, members)
        assert isinstance(heard, Dual)
        stack = heard.stack[:, 0]
        return torch.cat([stack[:1], stack[1:] / TANGENT])

    def coefficients(self, losses: Tensor) -> Tensor:
        return losses[1:]

    def spread(self, losses: Tensor) -> Tensor:
        """The limit of a finite difference's: the standard deviation of 0 and the derivatives."""
        return torch.cat([torch.zeros_like(losses[:1]), losses[1:]]).std(correction=0)
