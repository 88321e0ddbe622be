"""What every adapter answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mep_lightning.bases import Base


class Adapter(nn.Module, ABC):
    """The trained part. Its parameters stay fp32 whatever precision a Trainer asks for.

    (In half precision an update of lr 5e-3 to a token is mostly rounded away, and Adam's second moment underflows.)
    """

    theta: nn.Parameter
    origin: dict[str, str]
    """What it belongs to, as far as known: "base" (a hub id, a folder's absolute path or tiny), "precision" and
    "class_word". `attach` fills it in, exports keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.origin = {}

    @abstractmethod
    def attach(self, base: Base, class_word: str | None = None) -> None:
        """Create `theta` for this base, or check that what was loaded fits it."""

    @abstractmethod
    def phrase(self, class_word: str | None) -> str:
        """How prompts name the subject: "<sks> ball"."""

    def tokens(self, members: Tensor | None = None) -> dict[str, Tensor]:
        """What `encode_prompts` must know: name -> vectors, those of `members` [V, *theta.shape] where given."""
        return {}

    @abstractmethod
    def export(self, directory: Path) -> list[Path]:
        """Write the files that other programs load, each whole or not at all (`run_folder.replacing`); their paths."""

    @abstractmethod
    def load_export(self, directory: Path) -> None:
        """Read back what `export` wrote, `origin` included."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow moves to a device, refuse casts."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)  # never through half precision

        super()._apply(move, recurse)
        return self
