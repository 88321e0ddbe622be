"""What pages share: their templates, their looks, and pictures that lie in them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from mep_lightning.evaluation import grid

PICTURE = 384
"""Pixels a side that a page shows at most."""
FOLDERS = ("mep_lightning.evaluation", "mep_lightning.comparison")
"""Packages with templates."""


@dataclass
class Picture:
    """A picture on the page."""

    source: str
    caption: str = ""


def picture(image: Image.Image, caption: str = "", side: int = PICTURE) -> Picture:
    """A picture as a data URI: small ones exactly (PNG), large ones scaled down (JPEG), to keep the page light."""
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= grid.SMALLEST:
        image.save(buffer, format="PNG")
        kind = "png"
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", caption)


def render(template: str, **given: Any) -> str:
    """A page from its template; what users typed is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in FOLDERS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**given)
    return page.encode("utf-8", "replace").decode()  # halves of characters, which JSON may hold, are in no page
