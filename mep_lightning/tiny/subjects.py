"""Subjects of the tiny world: objects with marks that no caption names, five photos each, all drawn from seeds.

Styles are such marks on objects of five classes: what they share is how they are painted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mep_lightning.tiny.world import BACKGROUNDS, CLASSES, IDENTITY, Scenes, distinct_looks, random_scenes, render

PHOTOS = 5
# Seeds of the training scenes start at 1,000,000, so neither split was ever seen in training.
SEEDS = {"test": 1_000, "tune": 5_000, "sample": 9_000}
COUNTS = {"test": 30, "tune": 20, "sample": 1}


@dataclass(frozen=True)
class Subject:
    """One object to personalise.

    Attributes:
        name: for folders and tables, "ball-0".
        class_word: what it is, "ball".
        scenes: its PHOTOS scenes; only pose, light and background differ.
    """

    name: str
    class_word: str
    scenes: Scenes

    def images(self) -> Tensor:
        """Its photos, [5, 3, 64, 64] in [0, 1]."""
        return render(self.scenes)

    def photos(self) -> list[Image.Image]:
        return to_pil(self.images())


@dataclass(frozen=True)
class Style:
    """A way to paint objects.

    Attributes:
        name: for folders and tables, "style-0".
        scenes: PHOTOS scenes of objects of different classes that are painted alike.
        captions: what each shows, with {} where the style goes.
    """

    name: str
    scenes: Scenes
    captions: tuple[str, ...]

    def images(self) -> Tensor:
        """Its photos, [5, 3, 64, 64] in [0, 1]."""
        return render(self.scenes)

    def photos(self) -> list[Image.Image]:
        return to_pil(self.images())


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [N, 3, H, W] in [0, 1] as PIL images."""
    array = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


def subject(index: int, split: str = "test") -> Subject:
    """The `index`-th subject of a split ("test": reported; "tune": for choosing hyperparameters; "sample": shipped).

    Classes take turns; looks are distinct: paint between two palette colours, a pattern, a badge.
    """
    if not 0 <= index < COUNTS[split]:
        raise ValueError(f"no {split} subject {index}: there are {COUNTS[split]}")
    generator = torch.Generator().manual_seed(SEEDS[split] + index)
    identity = distinct_looks(1, generator).replace(kind=torch.tensor([index % len(CLASSES)]))
    views, _ = random_scenes(PHOTOS, generator)
    same = {name: getattr(identity, name).expand(PHOTOS, *getattr(identity, name).shape[1:]) for name in IDENTITY}
    backgrounds = torch.randperm(len(BACKGROUNDS), generator=generator)[:PHOTOS]
    word = CLASSES[index % len(CLASSES)]
    return Subject(f"{word}-{index // len(CLASSES)}", word, views.replace(background=backgrounds, **same))


def style(index: int, split: str = "test") -> Style:
    """The `index`-th style of a split, painted as its `index`-th subject is."""
    from mep_lightning.tiny.captions import PLACES

    scenes = subject(index, split).scenes
    generator = torch.Generator().manual_seed(SEEDS[split] + index)
    kinds = torch.randperm(len(CLASSES), generator=generator)[:PHOTOS]
    told = zip(kinds.tolist(), scenes.background.tolist(), strict=True)
    captions = tuple(f"a {{}} {CLASSES[kind]} {PLACES[BACKGROUNDS[place]][0]}" for kind, place in told)
    return Style(f"style-{index}", scenes.replace(kind=kinds), captions)


def subjects(split: str = "test", count: int | None = None) -> list[Subject]:
    """The first `count` subjects of a split (all by default)."""
    return [subject(i, split) for i in range(COUNTS[split] if count is None else count)]


def other_photos(who: Subject, count: int) -> Tensor:
    """Photos of a subject that are not among its own, [count, 3, 64, 64] in [0, 1]: to measure what was learned."""
    generator = torch.Generator().manual_seed(20_000)
    views, _ = random_scenes(count, generator)
    same = {
        name: getattr(who.scenes, name)[:1].expand(count, *getattr(who.scenes, name).shape[1:]) for name in IDENTITY
    }
    return render(views.replace(**same))
