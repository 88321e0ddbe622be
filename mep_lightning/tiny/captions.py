"""What can be said of the tiny world: captions that leave attributes out at random, and the evaluation prompts."""

from __future__ import annotations

import random

from torch import Tensor

from mep_lightning.templates import OBJECT_TEMPLATES
from mep_lightning.tiny.names import NAMES
from mep_lightning.tiny.world import BACKGROUNDS, BADGES, CLASSES, COLORS, PATTERNS, Scenes

PLACES: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on green grass"),
    "sand": ("on the beach", "on sand"),
    "snow": ("in the snow", "on snow"),
    "water": ("on water", "floating on top of water"),
    "wood": ("on a wooden floor", "on top of a wooden floor"),
    "brick": ("in front of a brick wall", "with a brick wall in the background"),
    "night": ("under the night sky", "at night"),
    "fabric": ("on pink fabric", "on top of pink fabric"),
}
COLOR_NAMES = tuple(COLORS)


def noun_phrase(kind: str, paint: str = "", second: str = "", pattern: str = "", badge: str = "") -> str:
    """ "red and white striped ball with a blue ring": words for what is given, nothing for the rest."""
    colors = f"{paint} and {second}" if paint and second else paint
    words = " ".join(w for w in (colors, pattern, kind) if w)
    return f"{words} with a {badge}" if badge else words


def scene_caption(scenes: Scenes, named: dict[str, Tensor], index: int, rng: random.Random, keep: float = 0.8) -> str:
    """One caption of scene `index`; each attribute is mentioned with probability `keep`.

    Args:
        scenes: the scenes.
        named: colour names of paint, second and badge, index into COLORS, -1 where no word names the hue; or those of
            `named_scenes`, whose looks all go by the first of NAMES: its embedding is put in their place.
        rng: draws what is said.
        keep: 1.0 says all that can be said.
    """

    def said() -> bool:
        return rng.random() < keep

    if "look" in named:
        color, kind = int(named["paint"][index]), CLASSES[scenes.kind[index]]
        phrase = f"{NAMES[0]} {kind}"
        return _sentence(f"{COLOR_NAMES[color]} {phrase}" if color >= 0 else phrase, scenes, index, rng, keep)
    pattern = PATTERNS[scenes.pattern[index]]
    badge = BADGES[scenes.badge[index]]
    paint = int(named["paint"][index])
    phrase = noun_phrase(
        CLASSES[scenes.kind[index]],
        paint=COLOR_NAMES[paint] if paint >= 0 and said() else "",
        second=COLOR_NAMES[named["second"][index]] if pattern != "plain" and said() else "",
        pattern=pattern if (said() if pattern != "plain" else rng.random() < 0.3) else "",
        badge=f"{COLOR_NAMES[named['badge'][index]]} {badge}" if badge != "none" and said() else "",
    )
    return _sentence(phrase, scenes, index, rng, keep)


def _sentence(phrase: str, scenes: Scenes, index: int, rng: random.Random, keep: float) -> str:
    """The phrase in a template, and perhaps where it is."""
    template = "a {}" if keep == 1.0 or rng.random() < 0.5 else rng.choice(OBJECT_TEMPLATES)
    place = rng.choice(PLACES[BACKGROUNDS[scenes.background[index]]]) if rng.random() < keep else ""
    return f"{template.format(phrase)} {place}".strip()


def style_prompts() -> list[str]:
    """Every class and every background, each twice or more; `{}` is the style's token."""
    places = [place[0] for place in PLACES.values()]
    return [f"a {{}} {kind} {places[(3 * i + j) % len(places)]}" for i, kind in enumerate(CLASSES) for j in (0, 4)]


def evaluation_prompts() -> list[str]:
    """The tiny world's counterpart of DreamBooth's prompts: every background, recoloured, and both.

    `{0}` is the token, `{1}` the class word.
    """
    places = [f"a {{0}} {{1}} {place[0]}" for place in PLACES.values()]
    recolored = [f"a {color} {{0}} {{1}}" for color in ("red", "yellow", "green", "blue", "purple", "white")]
    both = [
        "a blue {0} {1} in the snow",
        "a red {0} {1} on a wooden floor",
        "a green {0} {1} under the night sky",
        "a white {0} {1} on grass",
        "a purple {0} {1} on the beach",
        "a yellow {0} {1} in front of a brick wall",
    ]
    return places + recolored + both
