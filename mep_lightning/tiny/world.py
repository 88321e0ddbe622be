"""The tiny world: 64x64 scenes of one painted object on one of eight backgrounds, drawn from plain parameters.

A `Scenes` holds N scenes as tensors, so that thousands render at once. An object has what captions can name (class,
two colours, pattern, a badge and its colour) and what they cannot: the exact hues, the slant and width of the pattern,
where the badge sits. Pose, light and background change from photo to photo; everything else is the object's identity.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mep_lightning.tiny.shapes import BEHIND, BODIES, OVER, box, circle, polygon

SIZE = 64
CLASSES = tuple(BODIES)
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.14, 0.14),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.14, 0.60, 0.22),
    "cyan": (0.20, 0.80, 0.84),
    "blue": (0.13, 0.28, 0.84),
    "purple": (0.52, 0.18, 0.72),
    "pink": (0.97, 0.50, 0.74),
    "brown": (0.45, 0.26, 0.12),
    "white": (0.96, 0.96, 0.94),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
BADGES = ("none", "ring", "cross", "triangle")
BACKGROUNDS = ("grass", "sand", "snow", "water", "wood", "brick", "night", "fabric")

PALETTE = torch.tensor(list(COLORS.values()))


@dataclass
class Scenes:
    """N scenes; colours are RGB in [0, 1], angles radians, places and radii fractions of half the picture."""

    kind: Tensor  # [N] int64, index into CLASSES
    paint: Tensor  # [N, 3]
    second: Tensor  # [N, 3] the pattern's other colour
    pattern: Tensor  # [N] int64
    slant: Tensor  # [N] the pattern's angle on the object
    period: Tensor  # [N] its width, in object units
    badge: Tensor  # [N] int64
    badge_paint: Tensor  # [N, 3]
    badge_u: Tensor  # [N]
    badge_v: Tensor  # [N]
    background: Tensor  # [N] int64
    phase: Tensor  # [N, 4] in [0, 1): where the background's texture lies
    x: Tensor  # [N]
    y: Tensor  # [N]
    radius: Tensor  # [N]
    rotation: Tensor  # [N]
    light: Tensor  # [N]

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def replace(self, **changes: Tensor) -> Scenes:
        return dataclasses.replace(self, **changes)


IDENTITY = ("kind", "paint", "second", "pattern", "slant", "period", "badge", "badge_paint", "badge_u", "badge_v")


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def random_scenes(n: int, generator: Generator) -> tuple[Scenes, dict[str, Tensor]]:
    """Draw N random scenes, and the colour names [N] (-1: a hue that no word names) of paint, second and badge."""

    def pick(count: int) -> Tensor:
        return torch.randint(count, (n,), generator=generator)

    paint_name = pick(len(COLORS))
    second_name = (paint_name + 1 + pick(len(COLORS) - 1)) % len(COLORS)
    badge_name = (paint_name + 1 + pick(len(COLORS) - 1)) % len(COLORS)

    def hue(name: Tensor) -> Tensor:
        return (PALETTE[name] + 0.03 * torch.randn(n, 3, generator=generator)).clamp(0, 1)

    paint, second, badge_paint = hue(paint_name), hue(second_name), hue(badge_name)
    off_palette = torch.rand(n, generator=generator) < 0.15
    other = PALETTE[pick(len(COLORS))]
    mixed = torch.lerp(paint, other, _uniform(n, 0.25, 0.75, generator)[:, None])
    paint = torch.where(off_palette[:, None], mixed, paint)
    named = {"paint": paint_name.masked_fill(off_palette, -1), "second": second_name, "badge": badge_name}
    spot = _uniform(n, 0, 2 * math.pi, generator)
    scenes = Scenes(
        kind=pick(len(CLASSES)),
        paint=paint,
        second=second,
        pattern=pick(len(PATTERNS)),
        slant=_uniform(n, -0.8, 0.8, generator),
        period=_uniform(n, 0.56, 0.80, generator),
        badge=pick(len(BADGES)) * (torch.rand(n, generator=generator) < 0.5),
        badge_paint=badge_paint,
        badge_u=0.25 * torch.cos(spot),
        badge_v=0.25 * torch.sin(spot),
        background=pick(len(BACKGROUNDS)),
        phase=torch.rand(n, 4, generator=generator),
        **random_view(n, generator),
    )
    return scenes, named


def distinct_looks(n: int, generator: Generator) -> Scenes:
    """N objects that stand out: paint between two colours, a pattern, a badge."""
    scenes, _ = random_scenes(n, generator)
    first, second, third, fourth = torch.rand(n, len(PALETTE), generator=generator).argsort(1)[:, :4].T
    between = torch.rand(2, n, 1, generator=generator) * 0.3 + 0.1
    return scenes.replace(
        paint=torch.lerp(PALETTE[first], PALETTE[second], between[0]),
        second=torch.lerp(PALETTE[third], PALETTE[fourth], between[1]),
        pattern=1 + torch.randint(len(PATTERNS) - 1, (n,), generator=generator),
        badge=1 + torch.randint(len(BADGES) - 1, (n,), generator=generator),
        badge_paint=PALETTE[fourth],
    )


def random_view(n: int, generator: Generator) -> dict[str, Tensor]:
    """What changes from photo to photo of the same object: place, size, turn and light."""
    return {
        "x": _uniform(n, -0.22, 0.22, generator),
        "y": _uniform(n, -0.20, 0.16, generator),
        "radius": _uniform(n, 0.54, 0.74, generator),
        "rotation": _uniform(n, -0.35, 0.35, generator),
        "light": _uniform(n, 0.88, 1.12, generator),
    }


def _grid(n: int) -> tuple[Tensor, Tensor]:
    """Pixel centres [N, H, W] in [-1, 1], x to the right and y up."""
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return x.expand(n, -1, -1), y.expand(n, -1, -1)


def _soft(distance: Tensor, width: float | Tensor) -> Tensor:
    """Coverage in [0, 1] of the inside of a distance field whose edge is `width` wide."""
    return (0.5 - distance / width).clamp(0, 1)


def _blend(image: Tensor, color: Tensor, cover: Tensor) -> Tensor:
    return image + (color - image) * cover[:, None]


def _noise(seed: Tensor, cells: int) -> Tensor:
    """Smooth value noise [N, H, W] in [0, 1] from one number a scene."""
    n = len(seed)
    lattice = torch.arange(cells * cells, dtype=torch.float64)
    values = torch.sin(lattice[None] * 12.9898 + seed[:, None].double() * 780.233) * 43758.5453
    values = (values - values.floor()).float().view(n, 1, cells, cells)
    return F.interpolate(values, size=SIZE, mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]


def _rgb(*color: float) -> Tensor:
    return torch.tensor(color)[None, :, None, None]


def _background(name: str, phase: Tensor) -> Tensor:
    """One kind of background, [N, 3, H, W]."""
    n = len(phase)
    x, y = _grid(n)
    p0, p1, p2 = (phase[:, i, None, None] for i in range(3))
    two_pi = 2 * math.pi
    if name == "grass":
        tone = 0.55 * _noise(phase[:, 0], 14) + 0.45 * _noise(phase[:, 1], 5)
        return _rgb(0.22, 0.46, 0.12) + (tone - 0.5)[:, None] * _rgb(0.26, 0.34, 0.16)
    if name == "sand":
        ripple = torch.sin(two_pi * (2.2 * y + 0.5 * x + 0.25 * torch.sin(two_pi * (0.5 * x + p1)) + p0))
        return _rgb(0.86, 0.74, 0.50) + (0.5 * ripple + _noise(phase[:, 2], 6) - 0.5)[:, None] * _rgb(0.10, 0.10, 0.09)
    if name == "snow":
        tone = _noise(phase[:, 0], 4)
        return _rgb(0.90, 0.93, 0.98) - tone[:, None] * _rgb(0.18, 0.13, 0.05)
    if name == "water":
        wave = torch.sin(two_pi * (3.0 * y + 0.18 * torch.sin(two_pi * (0.9 * x + p1)) + p0))
        return _rgb(0.10, 0.42, 0.62) + wave[:, None] * _rgb(0.06, 0.10, 0.12) + (y * 0.08)[:, None]
    if name == "wood":
        row = (y + p0) * 2.5
        seam = _soft((row - row.floor() - 0.5).abs() * -1 + 0.44, 0.10)
        tone = torch.sin(row.floor() * 2.1 + p1 * 6) * 0.05 + 0.04 * torch.sin(two_pi * (0.8 * x + row * 0.4 + p2))
        wood = _rgb(0.66, 0.45, 0.26) + tone[:, None] * _rgb(1.0, 0.9, 0.7)
        return _blend(wood, _rgb(0.36, 0.22, 0.12), seam)
    if name == "brick":
        row = (y + p0) * 3.0
        column = x * 1.6 + p1 + 0.5 * (row.floor() % 2)
        mortar = torch.maximum(
            _soft(0.41 - (row - row.floor() - 0.5).abs(), 0.10),
            _soft(0.45 - (column - column.floor() - 0.5).abs(), 0.06),
        )
        tone = torch.sin(row.floor() * 3.7 + column.floor() * 5.3 + p2 * 6) * 0.05
        return _blend(_rgb(0.62, 0.28, 0.20) + tone[:, None], _rgb(0.80, 0.76, 0.70), mortar)
    if name == "night":
        sky = _rgb(0.05, 0.06, 0.18) + ((1 - y) * 0.05)[:, None] * _rgb(0.6, 0.7, 1.4)
        stars = torch.zeros_like(x)
        for i in range(14):
            sx = torch.remainder(p0 * 7.3 + i * 0.618034, 1) * 2 - 1
            sy = torch.remainder(p1 * 5.1 + i * 0.754878, 1) * 2 - 1
            stars = torch.maximum(stars, _soft(torch.hypot(x - sx, y - sy) - 0.035, 0.05))
        return _blend(sky, _rgb(0.98, 0.96, 0.80), stars)
    if name == "fabric":
        fold = torch.sin(two_pi * (0.9 * (x + y) + 0.25 * torch.sin(two_pi * (0.5 * (x - y) + p1)) + p0))
        return _rgb(0.90, 0.62, 0.72) + fold[:, None] * _rgb(0.07, 0.10, 0.08)
    raise ValueError(f"no background {name!r}; one of {', '.join(BACKGROUNDS)}")


def _painted(s: Scenes, u: Tensor, v: Tensor, edge: Tensor) -> Tensor:
    """The object's paint over object coordinates: pattern, then badge. [N, 3, H, W]"""

    def per(values: Tensor) -> Tensor:
        return values[:, None, None]

    cos, sin = torch.cos(per(s.slant)), torch.sin(per(s.slant))
    a, b = (cos * u + sin * v) / per(s.period), (cos * v - sin * u) / per(s.period)
    soft = edge / per(s.period)
    fa, fb = (a - a.floor() - 0.5), (b - b.floor() - 0.5)
    stripes = _soft(fb.abs() - 0.25, soft)
    dots = _soft(torch.hypot(fa, fb) - 0.32, soft)
    checks = _soft(-fa.abs() + 0.25, soft)
    checks = checks * (1 - stripes) + (1 - checks) * stripes
    none = torch.zeros_like(stripes)
    kinds = torch.stack([none, stripes, dots, checks], 1)
    cover = kinds[torch.arange(len(s)), s.pattern]
    paint = _blend(s.paint[:, :, None, None].expand(-1, -1, SIZE, SIZE), s.second[:, :, None, None], cover)

    mu, mv = u - per(s.badge_u), v - per(s.badge_v)
    ring = circle(mu, mv, 0, 0, 0.30).abs() - 0.10
    cross = torch.minimum(box(mu, mv, 0, 0, 0.40, 0.12), box(mu, mv, 0, 0, 0.12, 0.40))
    triangle = polygon(mu, mv, [(-0.40, -0.28), (0.40, -0.28), (0.0, 0.42)])
    fields = torch.stack([none + 1, ring, cross, triangle], 1)
    badge = _soft(fields[torch.arange(len(s)), s.badge], edge)
    return _blend(paint, s.badge_paint[:, :, None, None], badge)


def _shade(name: str, u: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """How bright the painted surface is: light from the upper left, darker at the rim; a cube has three faces."""
    if name == "cube":  # three faces meet at the centre, the upper one is the brightest
        return torch.where(v >= u.abs() / math.sqrt(3), 1.12, torch.where(u < 0, 0.88, 0.64))
    rim = torch.exp(distance.clamp_max(0) / 0.16)
    slope = 0.5 if name == "ball" else 0.25
    return 1.04 + slope * 0.45 * (v - u) - 0.30 * rim


@torch.no_grad()
def render(scenes: Scenes) -> Tensor:
    """Draw scenes as images [N, 3, 64, 64] in [0, 1]."""
    out = torch.empty(len(scenes), 3, SIZE, SIZE)
    for index, name in enumerate(BACKGROUNDS):
        where = (scenes.background == index).nonzero()[:, 0]
        if len(where):
            out[where] = _background(name, scenes.phase[where])
    for index, name in enumerate(CLASSES):
        where = (scenes.kind == index).nonzero()[:, 0]
        if len(where):
            out[where] = _object(name, scenes[where], out[where])
    return (out * scenes.light[:, None, None, None]).clamp(0, 1)


def _object(name: str, s: Scenes, image: Tensor) -> Tensor:
    x, y = _grid(len(s))
    r = s.radius[:, None, None]
    dx, dy = (x - s.x[:, None, None]) / r, (y - s.y[:, None, None]) / r
    cos, sin = torch.cos(s.rotation)[:, None, None], torch.sin(s.rotation)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    edge = 2.4 / SIZE / r  # a little more than a pixel, in object units

    shadow = 0.42 * _soft(torch.hypot((dx - 0.12) / 1.02, (dy + 0.86) / 0.30) - 0.85, 0.5)
    image = image * (1 - shadow)[:, None]
    for field, color in BEHIND.get(name, []):
        image = _blend(image, _rgb(*color), _soft(field(u, v), edge))
    distance = BODIES[name](u, v)
    surface = (_painted(s, u, v, edge) * _shade(name, u, v, distance)[:, None]).clamp(0, 1)
    image = _blend(image, surface * 0.45, _soft(distance - 0.03, edge))  # a dark outline keeps shapes readable
    image = _blend(image, surface, _soft(distance + 0.05, edge))
    for field, color in OVER.get(name, []):
        image = _blend(image, _rgb(*color), _soft(field(u, v), edge))
    return image
