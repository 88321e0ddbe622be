"""The embedded base: a really trained Stable-Diffusion-layout pipeline over a small procedural world.

`weights/base` is the pipeline, `weights/clip` and `weights/dino` the metric encoders; `train` is the recipe that made
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "base"
CLIP = WEIGHTS / "clip"
DINO = WEIGHTS / "dino"


def sample_photos() -> tuple[list[tuple[str, Image.Image]], str]:
    """The sample subject: five named 64x64 photos, and its class word."""
    from mep_lightning.tiny.subjects import subject

    sample = subject(0, "sample")
    return [(f"{sample.name}-{i}", photo) for i, photo in enumerate(sample.photos())], sample.class_word


def sample_style() -> list[tuple[str, Image.Image, str]]:
    """The sample style: five named 64x64 photos of unlike objects that look alike, and what each shows."""
    from mep_lightning.tiny.subjects import style

    sample = style(0, "sample")
    return [
        (f"{sample.name}-{i}", photo, caption)
        for i, (photo, caption) in enumerate(zip(sample.photos(), sample.captions, strict=True))
    ]


def style_prompts() -> list[str]:
    """Prompts with `{}` for a style's token: on an object of every class, and on every background."""
    from mep_lightning.tiny import captions

    return captions.style_prompts()


def evaluation_prompts() -> list[str]:
    """Prompts with `{0}` for the token and `{1}` for the class word: every background, and recoloured."""
    from mep_lightning.tiny import captions

    return captions.evaluation_prompts()
