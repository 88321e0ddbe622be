"""Proper names of the tiny world: made-up words, each for one fixed look.

Captions of attributes alone teach a text encoder words for one attribute each, and a single trained token then holds a
colour but no pattern. Names are there to teach it that one word can mean a whole appearance, as words do in large
models' captions. Named looks come from seeds of their own, none of them a subject's.
"""

from __future__ import annotations

import random
from functools import cache

import torch
from torch import Generator, Tensor

from mep_lightning.tiny.world import IDENTITY, PALETTE, Scenes, distinct_look, random_scenes

LOOKS_SEED = 70_000
RECOLORED = 0.3
"""How many scenes of a named look are repainted, and say so: names must go with other words."""


def _made_up_words(count: int) -> tuple[str, ...]:
    """Words of two syllables, the same every time."""
    syllables = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]
    pairs = [first + second for first in syllables for second in syllables if first != second]
    return tuple(random.Random(LOOKS_SEED).sample(pairs, count))


NAMES = _made_up_words(500)


@cache
def looks() -> Scenes:
    """The look of every name, a scene each."""
    generator = Generator().manual_seed(LOOKS_SEED)
    drawn = [distinct_look(generator) for _ in NAMES]
    return Scenes(**{field: torch.cat([getattr(look, field) for look in drawn]) for field in vars(drawn[0])})


def named_scenes(n: int, generator: Generator) -> tuple[Scenes, dict[str, Tensor]]:
    """Draw N scenes of named looks on objects of any class; "name" [N] is the index into NAMES, "paint" [N] the colour
    that it is repainted with, -1 where it is not."""
    scenes, _ = random_scenes(n, generator)
    name = torch.randint(len(NAMES), (n,), generator=generator)
    paint = torch.randint(len(PALETTE), (n,), generator=generator)
    paint = paint.masked_fill(torch.rand(n, generator=generator) >= RECOLORED, -1)
    look = looks()[name]
    scenes = scenes.replace(**{field: getattr(look, field) for field in IDENTITY if field != "kind"})
    repainted = torch.where((paint >= 0)[:, None], PALETTE[paint], scenes.paint)
    return scenes.replace(paint=repainted), {"name": name, "paint": paint}
