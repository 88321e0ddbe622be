"""The one place where noise meets parameters.

Noise is not kept from step to step: direction e_i of a parameter is `philox_normal(seed, step, i, param_id)`, made
again whenever it is needed (and held for the length of a step where it is little). Sums are formed in fp32 at least and
rounded once to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mep_lightning.kernels import philox_normal, philox_normals
from mep_lightning.tangents import Dual

Probe = tuple[int, float]
"""Where a member stands: (i, sign) is theta + sign * mu * e_i, and sign 0 is theta itself."""

ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The mu at which a finite difference is truest in half precision (docs/performance.md)."""
TANGENT = 2.0**-6
"""What a direction is scaled by while it is carried: next to a token e_i is as much longer, and what it becomes in a
network would leave fp16's range. A power of two changes no digit."""
DRAWN_TOGETHER = 1 << 16
"""Normals of several directions that one call may draw: a token's cost a call each (1 ms), whatever their number."""
DRAWN_AHEAD = 1 << 20
"""Normals that are worth 4 MiB for the length of a step: on a CPU a LoRA's hundred parameters cost a call each."""


def directions(theta: Tensor, seed: int, step: int, wanted: Sequence[int], param_id: int = 0) -> Iterator[Tensor]:
    """e_i ~ N(0, I) for every wanted i, in theta's shape, fp32 or wider; a few at a time where they are large."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    together = max(1, DRAWN_TOGETHER // max(1, theta.numel()))
    for start in range(0, len(wanted), together):
        drawn = philox_normal(seed, step, wanted[start : start + together], param_id, theta.numel(), theta.device)
        yield from (noise.view(theta.shape).to(dtype) for noise in drawn)


def direction(theta: Tensor, seed: int, step: int, i: int, param_id: int = 0) -> Tensor:
    """e_i alone."""
    return next(directions(theta, seed, step, [i], param_id))


def displaced(theta: Tensor, probe: Probe, mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """theta + sign * mu * e_i in theta's dtype; theta itself, no copy, for sign 0."""
    i, sign = probe
    return theta if sign == 0 else _moved(theta, direction(theta, seed, step, i, param_id), sign * mu)


def perturb(theta: Tensor, probes: Sequence[Probe], mu: float, seed: int, step: int, param_id: int = 0) -> Tensor:
    """All members together. theta [...] -> [V, ...], one for each probe."""
    wanted = moving(probes)
    return _moved_along(theta, probes, mu, zip(wanted, directions(theta, seed, step, wanted, param_id), strict=True))


def moving(probes: Sequence[Probe]) -> list[int]:
    """The directions along which there are members."""
    return sorted({i for i, sign in probes if sign})


def _moved_along(theta: Tensor, probes: Sequence[Probe], mu: float, noises: Iterable[tuple[int, Tensor]]) -> Tensor:
    members = theta.new_empty(len(probes), *theta.shape)
    moved: dict[int, list[tuple[Tensor, float]]] = {}  # by direction
    for member, (i, sign) in zip(members, probes, strict=True):
        if sign:
            moved.setdefault(i, []).append((member, sign))
        else:
            member.copy_(theta)
    for direction, noise in noises:
        for member, sign in moved[direction]:
            member.copy_(_moved(theta, noise, sign * mu))
    return members


def combine(coefficients: Tensor, theta: Tensor, seed: int, step: int, param_id: int = 0) -> Tensor:
    """sum_i c_i e_i over coefficients [n], in theta's shape and dtype."""
    total = torch.zeros(theta.shape, dtype=torch.promote_types(theta.dtype, torch.float32), device=theta.device)
    noises = directions(theta, seed, step, range(len(coefficients)), param_id)
    for coefficient, noise in zip(coefficients, noises, strict=True):
        total.add_(noise.mul_(coefficient))
    return total.to(theta.dtype)


def _moved(theta: Tensor, noise: Tensor, by: float) -> Tensor:
    return torch.add(theta, noise, alpha=by).to(theta.dtype)


@dataclass(frozen=True)
class Members:
    """V points around what is trained, told by what makes them: their values exist only where and while they are used.

    Attributes:
        probes: where each stands.
        mu: the finite step.
        seed, step: of the directions.
        noise: parameter id -> fp32 [directions, numel], drawn beforehand.
        among: whether they are some of members of which others move: all are then computed in the same way, as their
            losses are compared.
    """

    probes: Sequence[Probe] = ((0, 0.0),)
    mu: float = 0.0
    seed: int = 0
    step: int = 0
    noise: Mapping[int, Tensor] = field(default_factory=dict)
    among: bool = False

    def __len__(self) -> int:
        return len(self.probes)

    @property
    def directions(self) -> list[int]:
        """Along which there are members."""
        return moving(self.probes)

    @property
    def is_here(self) -> bool:
        """Whether all of them stand at theta itself."""
        return not self.directions

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody beside theta to compare with."""
        return self.is_here and not self.among

    def part(self, rank: int, world: int) -> tuple[Members, list[int]]:
        """Every `world`-th of them from `rank` on, and the places of their losses among all.

        All parts are of one size, where one is short its first stands ahead again: in batches of another size kernels
        round otherwise, which a finite difference would divide by mu.
        """
        places = list(range(rank, len(self.probes), world))
        missing = -(-len(self.probes) // world) - len(places)
        return self.chosen([*(places[:1] or [0]) * missing, *places]), places

    def chosen(self, places: Iterable[int]) -> Members:
        """Those at some places."""
        among = self.among or not self.is_here
        chosen = replace(self, probes=[self.probes[place] for place in places], noise={}, among=among)
        return replace(chosen, noise=self._noise_along(chosen.directions))

    def _noise_along(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        rows = [self.directions.index(i) for i in wanted]
        return {param_id: noise[rows] for param_id, noise in self.noise.items()}

    def drawn_for(self, parameters: Mapping[int, Tensor]) -> Members:
        """These members with their noise drawn in one go, where that of all parameters is little; else as they are."""
        wanted, sizes = self.directions, {param_id: theta.numel() for param_id, theta in parameters.items()}
        if not (wanted and sizes) or len(wanted) * sum(sizes.values()) > DRAWN_AHEAD:
            return self
        device = next(iter(parameters.values())).device
        return replace(self, noise=philox_normals(self.seed, self.step, wanted, sizes, device))

    def of(self, theta: Tensor, param_id: int = 0) -> Tensor:
        """Their values of a parameter, [V, *theta.shape]; differentiable where all stand at theta."""
        if self.is_here:
            return theta.expand(len(self.probes), *theta.shape)
        noises = self.noise_of(theta.detach(), param_id)
        return _moved_along(theta.detach(), self.probes, self.mu, zip(self.directions, noises, strict=True))

    def noise_of(self, theta: Tensor, param_id: int = 0) -> Iterable[Tensor]:
        """Every direction's e_i of a parameter, in its shape, fp32 or wider."""
        if param_id not in self.noise:
            return directions(theta, self.seed, self.step, self.directions, param_id)
        dtype = torch.promote_types(theta.dtype, torch.float32)
        return (noise.view(theta.shape).to(dtype) for noise in self.noise[param_id])


HERE = Members()
"""One member, at theta itself."""


@dataclass(frozen=True)
class Tangents(Members):
    """One point, theta itself, and the directions that its derivatives are asked along.

    Attributes:
        n: how many.
        wanted: which of them, where it is not all.
    """

    n: int = 1
    wanted: Sequence[int] | None = None

    @property
    def directions(self) -> list[int]:
        return list(range(self.n) if self.wanted is None else self.wanted)

    def part(self, rank: int, world: int) -> tuple[Tangents, list[int]]:
        """Every `world`-th direction, and their places behind the value, which is computed by all and the first's."""
        wanted = self.directions[rank::world]
        places = [1 + i for i in wanted]
        return replace(self, wanted=wanted, noise=self._noise_along(wanted)), [0, *places] if rank == 0 else places

    def of(self, theta: Tensor, param_id: int = 0) -> Dual:
        """A parameter and its tangents, TANGENT * e_i; its shape is [1, *theta.shape], as of one member."""
        theta = theta.detach()
        stack = theta.new_empty(1 + len(self.directions), 1, *theta.shape)
        stack[0] = theta
        for tangent, noise in zip(stack[1:, 0], self.noise_of(theta, param_id), strict=True):
            torch.mul(noise, TANGENT, out=tangent)
        return Dual(stack)
