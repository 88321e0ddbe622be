"""Proper names in the tiny world: one word for a whole look.

Captions of attributes alone teach a text encoder words for one attribute each, and a single trained token then holds a
colour but no pattern. Large models have read names, and know that one word can mean a whole appearance. Here every
named scene has a look of its own; `train.naming` gives looks their names. NAMES are made-up words for 500 of them, none
a subject's, that ship in the vocabulary.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mep_lightning.tiny.world import BADGES, IDENTITY, PALETTE, PATTERNS, Scenes, distinct_looks, random_scenes

LOOKS_SEED = 70_000
RECOLORED = 0.3
"""How many named scenes are repainted, and say so: names must go with other words."""
LOOK_SIZE = 3 + 3 + 3 + 2 + 2 + len(PATTERNS) + len(BADGES)


def _made_up_words(count: int) -> tuple[str, ...]:
    """Words of two syllables, the same every time."""
    syllables = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]
    pairs = [first + second for first in syllables for second in syllables if first != second]
    return tuple(random.Random(LOOKS_SEED).sample(pairs, count))


NAMES = _made_up_words(500)


def looks() -> Scenes:
    """The look of every name, a scene each."""
    return distinct_looks(len(NAMES), Generator().manual_seed(LOOKS_SEED))


def named_scenes(n: int, generator: Generator) -> tuple[Scenes, dict[str, Tensor]]:
    """Draw N scenes, each of a look of its own on an object of any class; "look" [N, LOOK_SIZE] describes it, "paint"
    [N] is the colour that it is repainted with, -1 where it is not."""
    scenes, _ = random_scenes(n, generator)
    own = distinct_looks(n, generator)
    scenes = scenes.replace(**{field: getattr(own, field) for field in IDENTITY if field != "kind"})
    look = describe(scenes)
    paint = torch.randint(len(PALETTE), (n,), generator=generator)
    paint = paint.masked_fill(torch.rand(n, generator=generator) >= RECOLORED, -1)
    repainted = torch.where((paint >= 0)[:, None], PALETTE[paint], scenes.paint)
    return scenes.replace(paint=repainted), {"look": look, "paint": paint}


def describe(scenes: Scenes) -> Tensor:
    """Looks as numbers of about unit size, [N, LOOK_SIZE]: all that is an object's own but its class."""
    return torch.cat(
        [
            *((color - 0.5) * 3 for color in (scenes.paint, scenes.second, scenes.badge_paint)),
            torch.stack([scenes.slant * 2, (scenes.period - 0.68) * 14], 1),
            torch.stack([scenes.badge_u, scenes.badge_v], 1) * 5,
            F.one_hot(scenes.pattern, len(PATTERNS)).float(),
            F.one_hot(scenes.badge, len(BADGES)).float(),
        ],
        1,
    )
