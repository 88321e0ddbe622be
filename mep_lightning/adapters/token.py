"""Textual Inversion's adapter: a new token's embedding (arXiv 2208.01618); ZOODiP trains the same."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mep_lightning.adapters.adapter import Adapter, read_export
from mep_lightning.bases import Base, condition_on_ids, prompt_ids
from mep_lightning.bases.tokens import token_rows, with_tokens
from mep_lightning.errors import UserError
from mep_lightning.estimators.perturbation import Members
from mep_lightning.run_folder import replacing
from mep_lightning.tangents import Dual

FILE = "learned_embeds.safetensors"
XL_KEYS = ("clip_l", "clip_g")
"""Under which other programs look for the vectors of SDXL's two text encoders."""
LONGEST = 200
"""Characters of a token's name."""


class TokenEmbedding(Adapter):
    """One new token of one or more vectors, in a parameter of its own; the embedding table stays frozen.

    Args:
        token: the token's name in prompts.
        init: a word whose embedding it starts from; "auto" is the class word, and of a style without one "style".
            It must be one token of the base.
        vectors: how many vectors it has; all start the same.

    Raises:
        UserError: the token has spaces, or `vectors` is not positive.
    """

    FILES = (FILE,)
    theta: nn.Parameter
    trains_text = True

    def __init__(self, token: str = "<sks>", init: str = "auto", vectors: int = 1):
        super().__init__()
        if not token or len(token.split()) != 1:
            raise UserError(f"the token {token!r} must be one word without spaces, such as <sks>")
        if vectors < 1:
            raise UserError(f"vectors is {vectors}: a token needs at least one")
        self.token, self.init, self.vectors = token, init, vectors
        self.widths: list[int] | None = None
        self.register_parameter("theta", None)

    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        """Start from the embedding of `init`; `theta` is [vectors, D], D the text encoders' widths added up."""
        if self.theta is not None:
            if self.theta.dim() != 2 or len(self.theta) == 0:
                raise UserError(f"the token {self.token} is {list(self.theta.shape)}, not [vectors, D]: it is damaged")
            self.vectors = len(self.theta)
        with_tokens(base.tokenizers[0], {self.token: self.vectors})  # refuses a name that is already a word
        widths = base.text_widths
        if self.theta is None:
            word = self._initial_id(base, class_word)  # all of SDXL's text encoders read the same vocabulary
            rows = [encoder.get_input_embeddings().weight[word] for encoder in base.text_encoders]
            start = torch.cat([row.detach().float() for row in rows])
            self.theta = nn.Parameter(start.repeat(self.vectors, 1))
        elif self.theta.shape[1] != sum(widths) or self.widths not in (None, widths):
            raise UserError(
                f"the token {self.token} has {self.theta.shape[1]} dimensions, the base {base.name} takes "
                f"{sum(widths)}: use the base it was trained on"
            )
        self.widths = widths
        self.theta.data = self.theta.data.to(base.device)
        self.remember_origin(base, class_word)

    def _initial_id(self, base: Base, class_word: str | None) -> int:
        if self.init != "auto":
            word = self.init
        elif class_word:
            word = class_word.split()[-1]  # "teddy bear": the noun
        else:
            word = _a_style(base) if self.is_style else "object"
        ids = _ids(base, word)
        if len(ids) != 1:
            known = [word for word in _common_words(base) if len(_ids(base, word)) == 1]
            example = f", such as --model.adapter.init_args.init {known[0]}" if known else ""
            others = f" (it also knows {', '.join(known[1:])})" if base.family == "tiny" else ""
            origin = "the class word's last word" if self.init == "auto" and class_word else "init"
            raise UserError(
                f"{origin}, {word!r}, is {len(ids)} tokens of the base {base.name}: give an init that is one"
                f"{example}{others}"
            )
        return ids[0]

    def vocabulary(self, base: Base) -> Tensor:
        """Embeddings of all words that the base knows, [N, D], as long as `theta`'s vectors; on the host."""
        tables: list[Any] = [encoder.get_input_embeddings() for encoder in base.text_encoders]  # type: ignore[operator]
        return torch.cat([table.weight.detach().cpu() for table in tables], dim=1)

    def tokens(self, members: Tensor | Members | None = None) -> dict[str, Tensor]:
        if isinstance(members, Members):
            members = members.of(self.theta)
        return {self.token: self.theta if members is None else members}

    def told(self, base: Base, values: Dual, text: str | None = None) -> list[Dual]:
        """What the U-Net is told of values of `theta`, [1, vectors, D] with tangents.

        Embeddings [1, T, D'], and of SDXL pooled text [1, P]; `text` is a prompt that holds the token, by default
        "a photo of a <sks> ball".
        """
        text = text or f"a photo of a {self.phrase(self.origin.get('class_word'))}"
        ids = prompt_ids(base, [text], self.tokens())
        with base.borrowed_text_encoders():
            told = condition_on_ids(base, ids, self.tokens(values))
        return [part for part in (told.embeds, told.pooled) if isinstance(part, Dual)]

    def export(self, directory: Path) -> list[Path]:
        """`learned_embeds.safetensors`: what diffusers' `load_textual_inversion` reads.

        {token: [vectors, D]}; of SDXL {"clip_l": [vectors, 768], "clip_g": [vectors, 1280]}, the token in its metadata.
        """
        path = Path(directory) / FILE
        self.refuse_infinite()
        values = self.theta.detach().float().cpu()
        widths = self.widths or [values.shape[1]]
        names = [self.token] if len(widths) == 1 else XL_KEYS
        parts = {name: part.contiguous() for name, part in zip(names, values.split(widths, dim=1), strict=True)}
        with replacing(path) as temporary:
            save_file(parts, temporary, self.metadata())
        return [path]

    def load_export(self, directory: Path) -> None:
        path = Path(directory) / FILE
        tensors, origin = read_export(Path(directory), FILE)
        names = XL_KEYS if set(tensors) == set(XL_KEYS) else tuple(tensors)
        parts = [tensors[name] for name in names]
        is_one_token = len(parts) == 1 or names == XL_KEYS
        if not is_one_token or any(part.dim() != 2 or len(part) != len(parts[0]) for part in parts):
            raise UserError(
                f"{path} holds {len(tensors)} tensors: a token's file has one, [vectors, dimensions], or for SDXL "
                "clip_l and clip_g"
            )
        named = origin.pop("token", self.token)
        token = named if names == XL_KEYS else names[0]
        if len(token.split()) != 1 or len(token) > LONGEST:
            raise UserError(f"{path} names its token {token[:LONGEST]!r}: it must be one word, such as <sks>")
        if not all(len(part) for part in parts):
            raise UserError(f"{path} holds no vectors: export it again")
        self.token = token
        self.widths = [part.shape[1] for part in parts]
        self.vectors = len(parts[0])
        self.theta = nn.Parameter(torch.cat(parts, dim=1).to(torch.float32))
        self.origin = origin

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """A checkpoint may come before `attach`: take the shape it has."""
        saved = state_dict.get(f"{prefix}theta")
        if self.theta is None and saved is not None:
            self.theta = nn.Parameter(saved.clone().float())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _ids(base: Base, word: str) -> list[int]:
    """The tokens that a base spells a word with, without those that begin and end a prompt."""
    ids = token_rows(base.tokenizers[0], [word])[0]
    return ids[1 : ids.index(base.tokenizers[0].eos_token_id)]


def _a_style(base: Base) -> str:
    """A word that begins a style's token: of `tiny`, which knows no "style", one of the names that its looks have."""
    if base.family == "tiny":
        from mep_lightning.tiny.names import NAMES

        return NAMES[0]
    return "style"


def _common_words(base: Base) -> list[str]:
    """Words to suggest as `init`: what `tiny` can draw, and nouns that every large vocabulary has."""
    if base.family == "tiny":
        from mep_lightning.tiny.world import CLASSES

        return list(CLASSES)
    return ["toy", "object", "thing", "person", "style"]
