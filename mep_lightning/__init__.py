"""mep-lightning: personalise text-to-image diffusion models in very little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mep_lightning.bases import load_base
    from mep_lightning.commands.learned import open_learned
    from mep_lightning.data import SubjectData
    from mep_lightning.errors import UserError
    from mep_lightning.estimators import ZerothOrderMixin
    from mep_lightning.module import PersonalizationModule

__all__ = ["PersonalizationModule", "SubjectData", "UserError", "ZerothOrderMixin", "load_base", "open_learned"]

_HOMES = {
    "PersonalizationModule": "module",
    "SubjectData": "data",
    "UserError": "errors",
    "ZerothOrderMixin": "estimators",
    "load_base": "bases",
    "open_learned": "commands.learned",
}


def __getattr__(name: str) -> Any:
    """Import lazily: `mep --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
