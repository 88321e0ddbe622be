"""The subspace of a token that its text encoders listen to; a zeroth-order estimator need not ask outside it.

A loss sees a token through what the U-Net is told alone, L(theta) = F(c(theta)), so that its gradient J' grad F lies
where J = dc/dtheta is not small. Text encoders answer to few of a token's hundreds of dimensions, and are small beside
a U-Net: all of J costs about as much as a dozen of the U-Net's forward passes (SD1.5), as tangents, without a backward
pass. Its right singular vectors tell beforehand, for all photos, noises and timesteps, where a gradient can be.

An estimate along n directions drawn there, orthogonal to one another, is sqrt(k / n) times as long as the gradient's
part in those k dimensions; along n independent ones of all d, sqrt((d + n + 1) / n) times. SG (`SubspaceGradient`)
looks for such dimensions in the token's noisy path.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mep_lightning.errors import UserError, refuse_unless
from mep_lightning.estimators.perturbation import TANGENT
from mep_lightning.estimators.subspace import Subspace
from mep_lightning.kernels import philox_normal
from mep_lightning.tangents import Dual, NoRuleError

TOGETHER, PASSES = 32, 8
"""Tangents that are carried in one pass, at most, and the fewest passes of a large theta: a text encoder's activations
stay small beside a U-Net's, also where both are small."""
WIDTH = 4096
"""Numbers to which a tangent of the conditioning is sketched, at least: SDXL's 2,048 of 159,000 would take 1.3 GB."""
PER_DIMENSION = 8
"""Or this many for each of theta's elements: a sketch cannot hold more dimensions than it has numbers."""
ROUNDING = 1e-6
"""Of the energy, in fp32: what is less is not listened to, whatever the share."""
TOKEN = 0
"""Parameter id of the normals that directions are made from, in the place of the token's own."""

Conditioned = Callable[[Dual], Iterable[Dual]]
"""Values of theta, [1, *theta.shape] with tangents -> all that is told of it, of any shapes."""


class ConditioningSubspace(Subspace):
    """The right singular vectors of J that hold `share` of its squared singular values, made anew every so many steps.

    Args:
        share: of J's squared Frobenius norm, above 0 and at most 1 (1 leaves all dimensions that reach the U-Net).
        every: steps after which J is taken again, at the token as it then is.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(self, share: float = 0.97, every: int = 50) -> None:
        refuse_unless(0 < share <= 1, "ConditioningSubspace.share", share, "a number above 0 and up to 1")
        refuse_unless(every >= 1, "ConditioningSubspace.every", every, "1 or more")
        self.share, self.every = share, every
        self.seen = 0
        self._made = -1  # `seen` when the basis was made
        self._basis: Tensor | None = None  # [k, d], on the CPU
        self._conditioned: Conditioned | None = None

    # -- where it comes from -------------------------------------------------------------------------------------------

    def begin(self, adapter: Any, base: Any, text: str | None = None) -> None:
        """Follow what a base is told of a token, in a prompt such as a step's."""
        held = weakref.ref(base)  # a base that is replaced must not be held here
        self.follow(lambda theta: adapter.told(held(), theta, text))

    def follow(self, conditioned: Conditioned) -> None:
        """What theta becomes before the costly part; it must carry tangents."""
        self._conditioned = conditioned

    @torch.no_grad()
    def prepare(self, theta: Tensor) -> None:
        """Make the basis at theta, where one is due.

        Raises:
            UserError: nothing was given to follow, what is told does not hang on theta, or theta is not finite.
        """
        if self._basis is not None and (self.seen % self.every or self._made == self.seen):
            return
        if not theta.isfinite().all():
            raise UserError("the trained values are no longer finite; lower lr, or raise a mu")
        gram = self._gram(theta)
        if not gram.isfinite().all():
            raise UserError("what the text encoders answer is not finite: set model.activations fp32, or lower lr")
        if not gram.trace() > 0:
            raise UserError("ConditioningSubspace follows what does not change with theta: follow() something else")
        energy, vectors = torch.linalg.eigh(gram)
        held = energy.flip(0).clamp_min(0).cumsum(0) / energy.clamp_min(0).sum()
        k = min(int((held < self.share * (1 - ROUNDING)).sum()) + 1, len(gram))
        self._basis = vectors[:, -k:].flip(1).T.float().contiguous()
        self._made = self.seen

    def _gram(self, theta: Tensor) -> Tensor:
        """J'J of the sketched conditioning, float64 [d, d], on the CPU."""
        rows = [self._along(theta, first).cpu() for first in range(0, theta.numel(), _together(theta))]
        jacobian = torch.cat(rows).double()  # [d, widths added up]
        return jacobian @ jacobian.T

    @torch.no_grad()
    def _along(self, theta: Tensor, first: int) -> Tensor:
        """Sketched derivatives of what is told along some of theta's elements, fp32 [those, widths added up]."""
        if self._conditioned is None:
            raise UserError("ConditioningSubspace has nothing to follow: call begin(adapter, base) or follow()")
        d = theta.numel()
        count = min(_together(theta), d - first)
        stack = theta.new_zeros(1 + count, d)
        stack[0] = theta.detach().flatten()
        stack[1:, first : first + count].fill_diagonal_(TANGENT)
        try:
            told = list(self._conditioned(Dual(stack.view(1 + count, 1, *theta.shape))))
        except NoRuleError as error:
            why = str(error).partition(":")[0]
            raise UserError(f"ConditioningSubspace cannot follow this base: {why}; set model.subspace null") from error
        if not told or not all(isinstance(part, Dual) for part in told):
            raise UserError("ConditioningSubspace follows what lost its tangents: follow() what is computed of theta")
        width = max(WIDTH, PER_DIMENSION * d)
        return torch.cat([sketch(part.tangents.flatten(1), width, i) for i, part in enumerate(told)], dim=1) / TANGENT

    def rehearse(self, theta: Tensor) -> None:
        self._along(theta, 0)

    # -- what it is for ------------------------------------------------------------------------------------------------

    @property
    def basis(self) -> Tensor | None:
        """Q [k, d] with orthonormal rows, what is kept, the most listened to first; None before a step."""
        return self._basis

    def adopt(self, basis: Tensor) -> None:
        self._basis = basis

    @property
    def dims_left(self) -> int | None:
        return None if self._basis is None else len(self._basis)

    def observe(self, theta: Tensor) -> None:
        self.seen += 1

    def kept(self, d: int) -> int:
        return 0  # its basis stays in the host's memory

    def directions(self, seed: int, step: int, n: int) -> Tensor | None:
        """sqrt(k) times orthonormal vectors of uniformly random orientation, k at a time where n is more."""
        if self._basis is None:
            return None
        k = len(self._basis)
        normals = philox_normal(seed, step, range(n), TOKEN, k).double()  # [n, k]
        blocks = []
        for block in normals.split(k):
            q, r = torch.linalg.qr(block.T)
            blocks.append((q * r.diagonal().sign()).T)  # without the sign the orientation would not be uniform
        return math.sqrt(k) * torch.cat(blocks).float() @ self._basis

    @torch.no_grad()
    def project_(self, grad: Tensor) -> Tensor:
        """g <- Q'Q g in place; returns grad."""
        if self._basis is None:
            return grad
        basis = self._basis.to(grad)
        with torch.autocast(grad.device.type, enabled=False):
            return grad.copy_((basis.T @ (basis @ grad.flatten())).view_as(grad))

    def basis_on(self, device: torch.device) -> Tensor | None:
        return None  # directions lie within

    def state_dict(self) -> dict[str, Any]:
        basis = None if self._basis is None else self._basis.clone()
        return {"share": self.share, "every": self.every, "seen": self.seen, "made": self._made, "basis": basis}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refuse_another(state, ("share", "every"))
        self.seen, self._made = state["seen"], state["made"]
        self._basis = None if state["basis"] is None else state["basis"].clone()


def _together(theta: Tensor) -> int:
    """How many tangents of theta are carried in one pass."""
    return min(TOGETHER, math.ceil(theta.numel() / PASSES))


def sketch(x: Tensor, width: int, index: int = 0) -> Tensor:
    """A count sketch, [N, M] -> [N, width] fp32, which keeps inner products up to a few percent; as it is if shorter.

    Columns in random order and with random signs are dealt round `width` sums (Charikar, Chen and Farach-Colton 2002),
    in an order that does not hang on a GPU's threads.
    """
    x, count = x.float(), x.shape[1]
    if count <= width:
        return x
    generator = torch.Generator().manual_seed(index)
    order = torch.randperm(count, generator=generator).to(x.device)
    sign = (2.0 * torch.randint(2, (count,), generator=generator) - 1).to(x.device)
    dealt = torch.nn.functional.pad((x * sign)[:, order], (0, -count % width))
    return dealt.view(len(x), -1, width).sum(1)
