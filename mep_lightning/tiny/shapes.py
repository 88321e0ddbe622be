"""The silhouettes of the tiny world: each class is a signed distance field over object coordinates.

Object coordinates: `u` to the right, `v` up, the body within about [-1, 1]. A field is negative inside. A class also
has fixed parts (a car's wheels, a fish's eye) which keep their own colour whatever the body is painted with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]

DARK = (0.12, 0.12, 0.14)
CREAM = (0.93, 0.88, 0.78)
GLASS = (0.78, 0.90, 0.96)


def circle(u: Tensor, v: Tensor, cu: float, cv: float, r: float) -> Tensor:
    return torch.hypot(u - cu, v - cv) - r


def ellipse(u: Tensor, v: Tensor, cu: float, cv: float, ru: float, rv: float) -> Tensor:
    """A first-order distance: exact on the outline, good near it."""
    return (torch.hypot((u - cu) / ru, (v - cv) / rv) - 1.0) * min(ru, rv)


def box(u: Tensor, v: Tensor, cu: float, cv: float, hu: float, hv: float, round_: float = 0.0) -> Tensor:
    du, dv = (u - cu).abs() - (hu - round_), (v - cv).abs() - (hv - round_)
    return torch.hypot(du.clamp_min(0), dv.clamp_min(0)) + torch.maximum(du, dv).clamp_max(0) - round_


def polygon(u: Tensor, v: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """A convex polygon, corners counter-clockwise: the largest of its half-plane distances."""
    planes = []
    for (au, av), (bu, bv) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(bu - au, bv - av)
        planes.append(((bv - av) * (u - au) - (bu - au) * (v - av)) / length)
    return torch.stack(planes).amax(0)


def ball(u: Tensor, v: Tensor) -> Tensor:
    return circle(u, v, 0, 0, 0.92)


HEXAGON = [(math.cos(a) * 0.98, math.sin(a) * 0.98) for a in (math.pi / 6 + i * math.pi / 3 for i in range(6))]


def cube(u: Tensor, v: Tensor) -> Tensor:
    return polygon(u, v, HEXAGON)


def mug(u: Tensor, v: Tensor) -> Tensor:
    handle = circle(u, v, 0.58, 0.0, 0.40).abs() - 0.12
    return torch.minimum(box(u, v, -0.15, 0, 0.70, 0.85, 0.12), handle)


def car(u: Tensor, v: Tensor) -> Tensor:
    cabin = polygon(u, v, [(-0.62, 0.0), (0.62, 0.0), (0.36, 0.62), (-0.42, 0.62)])
    return torch.minimum(box(u, v, 0, -0.16, 1.0, 0.34, 0.16), cabin)


def fish(u: Tensor, v: Tensor) -> Tensor:
    tail = polygon(u, v, [(0.40, 0.0), (1.0, -0.58), (1.0, 0.58)])
    return torch.minimum(ellipse(u, v, -0.22, 0, 0.76, 0.56), tail)


def star(u: Tensor, v: Tensor) -> Tensor:
    """A five-pointed star: fold the plane into one half-sector and measure to its single edge."""
    inner, outer, half = 0.52, 1.05, math.pi / 5
    radius, angle = torch.hypot(u, v), torch.atan2(u, v)
    angle = (torch.remainder(angle + half, 2 * half) - half).abs()
    x, y = radius * torch.cos(angle), radius * torch.sin(angle)
    eu, ev = inner * math.cos(half) - outer, inner * math.sin(half)
    return (ev * (x - outer) - eu * y) / math.hypot(eu, ev)


def heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner with a half-disc on each upper side."""
    side = 1.06
    w = v + 0.22
    diamond = (u.abs() + w.abs() - side / math.sqrt(2)) / math.sqrt(2)
    lobe = side / (2 * math.sqrt(2))
    return torch.minimum(diamond, circle(u.abs(), w, lobe, lobe, side / 2))


def house(u: Tensor, v: Tensor) -> Tensor:
    roof = polygon(u, v, [(-1.0, 0.08), (1.0, 0.08), (0.0, 0.98)])
    return torch.minimum(box(u, v, 0, -0.40, 0.72, 0.52), roof)


def mushroom(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(ellipse(u, v, 0, 0.0, 1.0, 0.92), -v)


def cat(u: Tensor, v: Tensor) -> Tensor:
    ear = polygon(u.abs(), v, [(0.18, 0.45), (0.84, 0.15), (0.80, 1.0)])
    return torch.minimum(ellipse(u, v, 0, -0.15, 0.90, 0.76), ear)


def _wheels(u: Tensor, v: Tensor) -> Tensor:
    return circle(u.abs(), v, 0.56, -0.48, 0.27)


def _windows(u: Tensor, v: Tensor) -> Tensor:
    return polygon(u, v, [(-0.44, 0.12), (0.44, 0.12), (0.28, 0.50), (-0.34, 0.50)])


BODIES: dict[str, Field] = {
    "ball": ball,
    "cube": cube,
    "mug": mug,
    "car": car,
    "fish": fish,
    "star": star,
    "heart": heart,
    "house": house,
    "mushroom": mushroom,
    "cat": cat,
}

# What is drawn behind (a stem) or over (eyes, wheels, a door) the painted body, each with its own colour.
BEHIND: dict[str, list[tuple[Field, tuple[float, float, float]]]] = {
    "mushroom": [(lambda u, v: box(u, v, 0, -0.42, 0.34, 0.56, 0.16), CREAM)],
}
OVER: dict[str, list[tuple[Field, tuple[float, float, float]]]] = {
    "car": [(_windows, GLASS), (_wheels, DARK)],
    "fish": [(lambda u, v: circle(u, v, -0.62, 0.14, 0.13), DARK)],
    "house": [(lambda u, v: box(u, v, 0, -0.64, 0.20, 0.28), DARK)],
    "cat": [
        (lambda u, v: circle(u.abs(), v, 0.36, 0.0, 0.14), DARK),
        (lambda u, v: polygon(u, v, [(-0.14, -0.30), (0.0, -0.46), (0.14, -0.30)]), DARK),
    ],
}
