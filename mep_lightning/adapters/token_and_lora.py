"""A token and a LoRA together, as pivotal tuning trains them: the word says which subject, the LoRA draws it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mep_lightning.adapters.adapter import Adapter
from mep_lightning.adapters.lora import LoRA
from mep_lightning.adapters.token import TokenEmbedding
from mep_lightning.bases import Base
from mep_lightning.errors import refuse_unless
from mep_lightning.estimators.perturbation import Members


class TokenAndLoRA(Adapter):
    """Both are trained in the same steps; exports are those of each.

    Args:
        word: the new token; its name stands in prompts.
        lora: the low-rank term; its own `token` is not used.
        token_lr: learning rate of the token; the LoRA has the module's.
    """

    FILES = (*TokenEmbedding.FILES, *LoRA.FILES)
    trains_text = True

    def __init__(
        self, word: TokenEmbedding | None = None, lora: LoRA | None = None, token_lr: float | None = 5e-3
    ) -> None:
        super().__init__()
        refuse_unless(token_lr is None or token_lr > 0, "TokenAndLoRA.token_lr", token_lr, "a number above 0, or null")
        self.word, self.lora = word or TokenEmbedding(), lora or LoRA()
        self.token_lr = token_lr
        self.lora.first_id = 1

    @property
    def token(self) -> str:  # type: ignore[override]
        return self.word.token

    @property
    def parts(self) -> Sequence[Adapter]:
        return (self.word, self.lora)

    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        for part in self.parts:
            part.attach(base, class_word, without)
        self.origin = dict(self.word.origin)

    def detach(self) -> None:
        for part in self.parts:
            part.detach()

    def numbered(self) -> dict[int, nn.Parameter]:
        return self.word.numbered() | self.lora.numbered()

    def tokens(self, members: Tensor | Members | None = None) -> dict[str, Tensor]:
        return self.word.tokens(members)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.lora.layers

    @contextmanager
    def at(self, members: Members) -> Iterator[None]:
        with self.lora.at(members):
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        with self.lora.away():
            yield

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        own = {} if self.token_lr is None else {"lr": self.token_lr}
        return [{"params": list(self.word.numbered().values()), **own}, *self.lora.parameter_groups]

    def export(self, directory: Path) -> list[Path]:
        self.lora.token = self.token
        return [path for part in self.parts for path in part.export(directory)]

    def load_export(self, directory: Path) -> None:
        for part in self.parts:
            part.load_export(directory)
        self.origin = dict(self.word.origin)
