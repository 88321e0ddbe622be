"""Grids of pictures with captions, as PNGs that remember what they show, so that a report can take them apart again."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from mep_lightning.run_folder import replacing

KEY = "mep-grid"
SMALLEST, LARGEST = 192, 512
GAP, MARGIN, FONT_SIZE = 10, 16, 14
PAPER, INK, QUIET = (255, 255, 255), (24, 24, 27), (113, 113, 122)


@dataclass
class Row:
    """A line of pictures: its heading, and a caption a picture (or none at all)."""

    heading: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


@dataclass
class Grid:
    """A drawn grid, and what a program must know to find the pictures in it.

    Args:
        image: the whole drawing.
        boxes: for each row, the (left, top, right, bottom) of each picture.
        info: what the pictures are, such as prompts and seeds; plain JSON values.
    """

    image: Image.Image
    boxes: list[list[tuple[int, int, int, int]]]
    info: dict[str, Any] = field(default_factory=dict)

    def cells(self, row: int = 0) -> list[Image.Image]:
        """The pictures of a row."""
        return [self.image.crop(box) for box in self.boxes[row]]


def draw(rows: Sequence[Row], **info: Any) -> Grid:
    """Draw rows of pictures, scaled to one cell size: small ones by a whole factor, so that 64 pixels can be seen.

    Args:
        rows: from top to bottom; all pictures are shown as squares of one size.
        info: kept in the grid, see `Grid.info`.
    """
    side = max((max(image.size) for row in rows for image in row.images), default=SMALLEST)
    cell = side * -(-SMALLEST // side) if side < SMALLEST else min(side, LARGEST)
    columns = max((len(row.images) for row in rows), default=0)
    font, bold = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 2)
    line = FONT_SIZE + 4
    captions = [[_wrap(text, cell, font) for text in row.captions] for row in rows]
    heights = [
        (line + 6 if row.heading else 0) + cell + (line * max(map(len, wrapped)) + 6 if wrapped else 0)
        for row, wrapped in zip(rows, captions, strict=True)
    ]
    width = 2 * MARGIN + columns * cell + max(columns - 1, 0) * GAP
    image = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + GAP * max(len(rows) - 1, 0)), PAPER)
    pen = ImageDraw.Draw(image)
    boxes, top = [], MARGIN
    for row, wrapped, height in zip(rows, captions, heights, strict=True):
        y = top
        if row.heading:
            pen.text((MARGIN, y), row.heading, INK, bold)
            y += line + 6
        places = []
        for column, picture in enumerate(row.images):
            x = MARGIN + column * (cell + GAP)
            image.paste(_fit(picture, cell), (x, y))
            places.append((x, y, x + cell, y + cell))
            for number, text in enumerate(wrapped[column] if column < len(wrapped) else []):
                pen.text((x, y + cell + 6 + number * line), text, QUIET, font)
        boxes.append(places)
        top += height + GAP
    return Grid(image, boxes, dict(info))


def save(grid: Grid, path: Path) -> Path:
    """Write a grid as PNG, whole or not at all."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEY, json.dumps({"boxes": grid.boxes, **grid.info}))
    with replacing(path) as temporary:
        grid.image.save(temporary, format="PNG", pnginfo=text)
    return path


def load(path: Path) -> Grid | None:
    """Read a grid back; None where the file is missing, unreadable or no grid of ours."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with Image.open(path) as opened:
            opened.load()
            info = json.loads(opened.text[KEY])  # type: ignore[attr-defined]
            boxes = [[(int(a), int(b), int(c), int(d)) for a, b, c, d in row] for row in info.pop("boxes")]
            return Grid(opened.convert("RGB"), boxes, info)
    except Exception:  # a damaged file makes Pillow's decoders raise nearly anything
        return None


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """A picture centred in a square of `cell` pixels, its proportions kept."""
    image = image.convert("RGB")
    scale = cell / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(image, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def _wrap(text: str, width: int, font: Any, most: int = 3) -> list[str]:
    """A caption in lines that fit the width, at most `most` of them."""
    widest = max(int(width / font.getlength("i")), 5)
    text = text[: (most + 1) * widest]  # more is on no line, and would be wrapped again and again
    for letters in range(widest, 4, -1):
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines or [""]
