"""Textual Inversion's adapter: a new token's embedding (arXiv 2208.01618); ZOODiP trains the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mep_lightning.adapters.adapter import Adapter
from mep_lightning.bases import Base
from mep_lightning.bases.conditioning import token_ids, with_tokens
from mep_lightning.errors import UserError

FILE = "learned_embeds.safetensors"


class TokenEmbedding(Adapter):
    """One new token of one or more vectors, in a parameter of its own; the embedding table stays frozen.

    Args:
        token: the token's name in prompts.
        init: a word whose embedding it starts from; "auto" is the class word. It must be one token of the base.
        vectors: how many vectors it has; all start the same.

    Raises:
        UserError: the token has spaces, or `vectors` is not positive.
    """

    def __init__(self, token: str = "<sks>", init: str = "auto", vectors: int = 1):
        super().__init__()
        if not token or len(token.split()) != 1:
            raise UserError(f"the token {token!r} must be one word without spaces, such as <sks>")
        if vectors < 1:
            raise UserError(f"vectors is {vectors}: a token needs at least one")
        self.token, self.init, self.vectors = token, init, vectors
        self.register_parameter("theta", None)

    def attach(self, base: Base, class_word: str | None = None) -> None:
        """Start from the embedding of `init`; `theta` is [vectors, D]."""
        with_tokens(base.tokenizers[0], {self.token: self.vectors})  # refuses a name that is already a word
        table: Tensor = base.text_encoders[0].get_input_embeddings().weight  # type: ignore[operator]
        if self.theta is None:
            start = table[self._initial_id(base, class_word)].detach().float()
            self.theta = nn.Parameter(start.repeat(self.vectors, 1))
        elif self.theta.shape[1] != table.shape[1]:
            raise UserError(
                f"the token {self.token} has {self.theta.shape[1]} dimensions, the base {base.name} takes "
                f"{table.shape[1]}: use the base it was trained on"
            )
        self.theta.data = self.theta.data.to(base.device)

    def _initial_id(self, base: Base, class_word: str | None) -> int:
        word = (class_word or "object").split()[-1] if self.init == "auto" else self.init  # "teddy bear": the noun
        ids = token_ids(base.tokenizers[0], [word])[0].tolist()
        inner = ids[1 : ids.index(base.tokenizers[0].eos_token_id)]
        if len(inner) != 1:
            raise UserError(
                f"init {word!r} is {len(inner)} tokens of the base {base.name}: give a word that is one, such as "
                "--model.adapter.init_args.init toy"
            )
        return inner[0]

    def phrase(self, class_word: str | None) -> str:
        return f"{self.token} {class_word}" if class_word else self.token

    def tokens(self, members: Tensor | None = None) -> dict[str, Tensor]:
        return {self.token: self.theta if members is None else members}

    def export(self, directory: Path) -> list[Path]:
        """`learned_embeds.safetensors`, {token: [vectors, D]}: what diffusers' `load_textual_inversion` reads."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({self.token: self.theta.detach().float().cpu().contiguous()}, partial)
        partial.replace(path)
        return [path]

    def load_export(self, directory: Path) -> None:
        path = Path(directory) / FILE
        if not path.exists():
            raise UserError(f"{directory} holds no {FILE}: give the folder of a finished run or of an export")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): export it again") from None
        (self.token, values), *more = tensors.items()
        if more or values.dim() != 2:
            raise UserError(f"{path} holds {len(tensors)} tensors: a token's file has one, [vectors, dimensions]")
        self.vectors = len(values)
        self.theta = nn.Parameter(values.to(torch.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """A checkpoint may come before `attach`: take the shape it has."""
        saved = state_dict.get(f"{prefix}theta")
        if self.theta is None and saved is not None:
            self.theta = nn.Parameter(saved.clone().float())
        super()._load_from_state_dict(state_dict, prefix, *args)
