"""The frozen base models: loading, text conditioning, the walk through the U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mep_lightning.bases.families import Family, identify

if TYPE_CHECKING:
    from mep_lightning.bases.base import Base, BaseFolder
    from mep_lightning.bases.conditioning import (
        Conditioning,
        condition_on,
        condition_on_ids,
        encode_prompts,
        prompt_ids,
        remember,
    )
    from mep_lightning.bases.load import exact_device, load_base, open_base
    from mep_lightning.bases.walk import predict_noise

__all__ = [
    "Base",
    "BaseFolder",
    "Conditioning",
    "Family",
    "condition_on",
    "condition_on_ids",
    "encode_prompts",
    "exact_device",
    "identify",
    "load_base",
    "open_base",
    "predict_noise",
    "prompt_ids",
    "remember",
]

_HOMES = {
    "Base": "base",
    "BaseFolder": "base",
    "Conditioning": "conditioning",
    "condition_on": "conditioning",
    "condition_on_ids": "conditioning",
    "encode_prompts": "conditioning",
    "exact_device": "load",
    "load_base": "load",
    "open_base": "load",
    "predict_noise": "walk",
    "prompt_ids": "conditioning",
    "remember": "conditioning",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for: `identify` answers from JSON alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
