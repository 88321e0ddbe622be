"""New words beside a base's own: tokenizers that know them, and prompts as ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mep_lightning.errors import UserError


def with_tokens(tokenizer: Any, counts: Mapping[str, int]) -> Any:
    """A copy of a CLIP tokenizer that also knows new tokens; a token of n vectors is `<sks> <sks>_1 … <sks>_{n-1}`.

    Args:
        tokenizer: the base's own, left as it is.
        counts: vectors a token.

    Raises:
        UserError: the tokenizer already knows one of them.
    """
    known = tokenizer.get_vocab()
    names = [name for token, count in counts.items() for name in vector_names(token, count)]
    for name in names:
        if name in known or f"{name.lower()}</w>" in known:
            raise UserError(f"the token {name!r} is already a word of the base: choose another, such as <sks>")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(names)
    return tokenizer


def vector_names(token: str, count: int) -> list[str]:
    return [token] + [f"{token}_{i}" for i in range(1, count)]


def expand(prompt: str, counts: Mapping[str, int]) -> str:
    """Write a token of several vectors out as that many words."""
    for token, count in counts.items():
        prompt = prompt.replace(token, " ".join(vector_names(token, count)))
    return prompt


def token_rows(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Ids, N rows of T, padded to the text encoder's full length and truncated there."""
    return tokenizer(list(prompts), padding="max_length", truncation=True).input_ids


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """`token_rows` as a tensor, int64 [N, T]."""
    return torch.tensor(token_rows(tokenizer, prompts))
