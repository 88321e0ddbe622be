"""Subspace Gradient (ZOODiP): directions in which the token's recent path hardly moved are noise, and are removed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.kernels import subspace_project_

RANK_CUTOFF = 1e-9  # on singular values; centring leaves one direction of pure rounding


def low_variance_basis(path: Tensor, nu: float) -> tuple[Tensor, int]:
    """Directions inside a path's span that carry the last `nu` of its variance.

    PCA of the path with every feature centred and scaled to unit (population) std, in float64: eigenvalues
    l_1 >= l_2 >= ..., i* the smallest i with sum_{j<=i} l_j / sum l > 1 - nu. A constant feature is left unscaled.

    Args:
        path: [tau, d].
        nu: in [0, 1].

    Returns:
        P [r - i*, d] float64 with orthonormal rows, components i*+1 .. r (r the numerical rank), and i*.
    """
    x = path.to(torch.float64)
    constant = x.amax(0) == x.amin(0)  # exactly: a mean's rounding would give it a tiny std
    z = ((x - x.mean(0)) / x.std(0, correction=0).where(~constant, 1.0)).where(~constant, 0.0)
    _, singular, components = torch.linalg.svd(z, full_matrices=False)
    rank = int((singular > RANK_CUTOFF * singular[0]).sum())
    if rank == 0:
        return components[:0], 0
    variance = singular[:rank].square()
    explained = variance.cumsum(0) / variance.sum()
    beyond = (explained > 1 - nu).nonzero()
    kept = int(beyond[0]) + 1 if len(beyond) else rank
    return components[kept:rank], kept


class Subspace(ABC):
    """Where a token's gradient is kept to: what lies outside is noise."""

    AUTO: ClassVar[dict[str, str]] = {}

    def begin(self, adapter: Any, base: Any, text: str | None = None) -> None:
        """Look at what will be trained, once it is attached to its base, and before the first step.

        Args:
            adapter: what is trained.
            base: what it is attached to.
            text: a prompt of a step's, with the subject in it; None where there are no data.
        """
        return  # not all need it

    def prepare(self, theta: Tensor) -> None:
        """Get ready for a step at theta; called before every one."""
        return  # nor this

    def rehearse(self, theta: Tensor) -> None:
        """Compute as much at once as `prepare` does, for a plan of memory."""
        return  # nor that

    @abstractmethod
    def observe(self, theta: Tensor) -> None:
        """Take notice of theta after an update."""

    @property
    @abstractmethod
    def basis(self) -> Tensor | None:
        """What it was made of last, [k, d] with orthonormal rows; a new object whenever it was made anew."""

    @abstractmethod
    def adopt(self, basis: Tensor) -> None:
        """Take the basis that another process made at the same theta."""

    @property
    @abstractmethod
    def dims_left(self) -> int | None:
        """Dimensions of the subspace; None before theta was ever seen."""

    @abstractmethod
    def kept(self, d: int) -> int:
        """Numbers that it keeps on the device, of a theta of d elements."""

    @abstractmethod
    def directions(self, seed: int, step: int, n: int) -> Tensor | None:
        """Directions e_i within it, [n, d] fp32 with E[e e'] the projector onto it, a pure function of (seed, step).

        Orthogonal to one another, `dims_left` at a time; None where an estimator draws them everywhere, and `basis_on`
        is projected out afterwards.
        """

    @abstractmethod
    def basis_on(self, device: torch.device) -> Tensor | None:
        """P [k, d] with orthonormal rows, what is projected out of a gradient along directions from everywhere."""

    @abstractmethod
    def project_(self, grad: Tensor) -> Tensor:
        """Remove from a gradient what lies outside, in place; returns it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was written.

        Raises:
            CheckpointError: it was written by another subspace, with other settings, or is not whole.
        """

    def refuse_another(self, state: dict[str, Any], settings: tuple[str, ...]) -> None:
        """Raise CheckpointError unless a state has all that this one's has, and was written with these settings."""
        name = type(self).__name__
        if missing := [key for key in self.state_dict() if key not in state]:
            raise CheckpointError(
                f"the checkpoint's {name} lacks {missing[0]}: it is damaged, or another's; resume with the run's own"
            )
        for setting in settings:
            if state[setting] != getattr(self, setting):
                raise CheckpointError(
                    f"the checkpoint's {name} has {setting}={state[setting]}, this one {setting}="
                    f"{getattr(self, setting)}; resume with the same value"
                )
        for key, mine in self.state_dict().items():
            value = state[key]
            is_matrix = value is None or (isinstance(value, Tensor) and value.dim() == 2)
            is_count = type(value) is int
            if key not in settings and not (is_count if isinstance(mine, int) else is_matrix or is_count):
                raise CheckpointError(f"the checkpoint's {name} has a {key} of another kind: it is damaged")


class SubspaceGradient(Subspace):
    """Remembers theta's last tau values and projects their low-variance directions out of a gradient.

    Call `observe(theta)` after every update and `project_(grad)` before the next. Nothing is projected until tau values
    were seen; then the basis is refreshed every tau and held in between. Directions outside the path's span are kept.

    Args:
        tau: length of the path, at least 2; any relation to theta's size. "auto" is what a module takes from its
            defaults.
        nu: share of the variance to remove, in [0, 1]; "auto" as for tau.
    """

    AUTO: ClassVar[dict[str, str]] = {"tau": "tau", "nu": "nu"}

    def __init__(self, tau: int | Literal["auto"] = 128, nu: float | Literal["auto"] = 1e-3) -> None:
        if tau != "auto" and tau < 2:
            raise UserError(f"SubspaceGradient.tau is {tau}, but a path needs at least 2 points")
        if nu != "auto" and not 0 <= nu <= 1:
            raise UserError(f"SubspaceGradient.nu is {nu}, but a share of the variance lies in 0..1, such as 1e-3")
        self.tau: int | Literal["auto"] = tau
        self.nu: float | Literal["auto"] = nu
        self.seen = 0
        self.rank_kept = 0
        self._path: Tensor | None = None  # [tau, d], written in turn
        self._basis: Tensor | None = None  # P [k, d], None until tau values were seen

    @property
    def basis(self) -> Tensor | None:
        """P [k, d], what is projected out; None while nothing is."""
        return self._basis

    def adopt(self, basis: Tensor) -> None:
        self._basis = basis

    @property
    def dims_left(self) -> int | None:
        """d less the directions projected out; None before theta was ever seen."""
        if self._path is None:
            return None
        return self._path.shape[1] - (0 if self._basis is None else len(self._basis))

    @torch.no_grad()
    def observe(self, theta: Tensor) -> None:
        """Remember theta (any shape, d elements); every tau-th call makes a new basis.

        Raises:
            UserError: tau or nu still is "auto", or a basis is due and the path holds a value that is not finite.
        """
        tau, nu = self.tau, self.nu
        if isinstance(tau, str) or isinstance(nu, str):
            raise UserError("SubspaceGradient's tau or nu is 'auto' outside a module; set them, such as 128 and 1e-3")
        if self._path is None:
            wide = torch.promote_types(theta.dtype, torch.float32)
            self._path = torch.zeros(tau, theta.numel(), dtype=wide, device=theta.device)
        if self._path.device != theta.device:  # a checkpoint was read elsewhere
            self._path = self._path.to(theta.device)
        self._path[self.seen % tau] = theta.detach().flatten()
        self.seen += 1
        if self.seen % tau == 0:
            if not self._path.isfinite().all():
                raise UserError("the trained values are no longer finite; lower lr, or raise a mu")
            # On the CPU whatever theta's device: float64 is fast there, and the basis comes out the same.
            basis, self.rank_kept = low_variance_basis(self._path.cpu(), nu)
            self._basis = basis.to(self._path).contiguous()

    def kept(self, d: int) -> int:
        """The path and its basis."""
        return 2 * int(self.tau) * d

    @torch.no_grad()
    def project_(self, grad: Tensor) -> Tensor:
        """g <- g - P'P g in place; returns grad."""
        basis = self.basis_on(grad.device)
        return grad if basis is None else subspace_project_(grad, basis)

    def directions(self, seed: int, step: int, n: int) -> Tensor | None:
        return None

    def basis_on(self, device: torch.device) -> Tensor | None:
        """P on a device, where a basis from a checkpoint may not be yet; None while nothing is projected out."""
        if self._basis is None or len(self._basis) == 0:
            return None
        if self._basis.device != device:
            self._basis = self._basis.to(device)
        return self._basis

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as tensors and numbers."""
        path, basis = (None if t is None else t.clone() for t in (self._path, self._basis))
        return {
            "tau": self.tau,
            "nu": self.nu,
            "seen": self.seen,
            "rank_kept": self.rank_kept,
            "path": path,
            "basis": basis,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refuse_another(state, ("tau", "nu"))
        self.seen, self.rank_kept = state["seen"], state["rank_kept"]
        self._path, self._basis = (None if t is None else t.clone() for t in (state["path"], state["basis"]))
