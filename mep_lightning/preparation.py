"""What a module is told of its data before the base comes: what the photos show, and their latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mep_lightning.bases import BaseFolder
from mep_lightning.data import SubjectData
from mep_lightning.errors import refuse_unless
from mep_lightning.phases import phase

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule


def encodes(data: Any) -> bool:
    """Whether data are `SubjectData`, or give themselves out for such."""
    return hasattr(data, "encode") and hasattr(data, "resolution")


def acquaint(module: PersonalizationModule, data: Any) -> None:
    """Tell a module what its photos show, and the data how captions may name it and what its draws come from.

    Args:
        data: a Trainer's data module, which may be the user's own; None where it has none.
    """
    module.photos = data if isinstance(data, SubjectData) else None
    if data is None:
        return
    module.class_word = getattr(data, "class_word", None)
    for part in (module.adapter, *module.adapter.parts):
        part.is_style = getattr(data, "is_style", False)
    if encodes(data):
        data.token = module.adapter.token
        data.default_seed = module.seed
    if module.subspace is not None and module.photos is not None:
        module.example = module.photos.texts[0]


def encode(module: PersonalizationModule, data: Any, found: BaseFolder) -> None:
    """Encode the photos at every resolution that the module trains at."""
    with phase("encode"):
        high, low = found.resolution if data.resolution == "auto" else data.resolution, module.low_resolution
        if low is not None:
            refuse_unless(low < high, "model.low_resolution", low, f"less than data.resolution, which is {high}")
        data.encode(found, [high] if low is None else [high, low])
