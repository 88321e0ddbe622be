"""Prompts to embeddings, with trained vectors in the place of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mep_lightning.bases.base import Base
from mep_lightning.bases.tokens import expand, token_rows
from mep_lightning.errors import UserError

Tokens = Mapping[str, Tensor]


@contextmanager
def injected(text_encoder: nn.Module, vectors: Tensor, first: int, members: int) -> Iterator[None]:
    """Let ids from `first` on mean `vectors`, while the embedding table stays untouched.

    Args:
        text_encoder: a CLIP text encoder; its batch is member-major, [V * N, T].
        vectors: [V, n, D] (or [n, D] with one member).
        first: the first new id, the tokenizer's length before any was added (a table may be padded beyond it).
        members: V.
    """
    table: nn.Embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    vectors = vectors if vectors.dim() == 3 else vectors[None]
    seen: list[Tensor] = []

    def hide(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0].clamp_max(first - 1), *args[1:])

    def reveal(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = seen.pop()  # [V * N, T]
        new = ids >= first
        member = torch.arange(members, device=ids.device).repeat_interleave(len(ids) // members)
        values = vectors[member[:, None], (ids - first).clamp_min(0)]  # [V * N, T, D]
        return torch.where(new[..., None], values.to(output.dtype), output)

    handles = [table.register_forward_pre_hook(hide), table.register_forward_hook(reveal)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode_prompts(base: Base, prompts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
    """Embed prompts, once for every member.

    Args:
        base: whose text encoder.
        prompts: N texts; they may hold the names in `tokens`.
        tokens: name -> vectors [n, D], or [V, n, D] for V members at once.

    Returns:
        [N, T, D], or [V * N, T, D], member-major, in the base's dtype.
    """
    return encode_ids(base, prompt_ids(base, prompts, tokens), tokens)


def prompt_ids(base: Base, prompts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
    """What the text encoder reads of prompts: int64 [N, T]; arguments as `encode_prompts`'.

    Raises:
        UserError: a prompt is so long that trained vectors would be cut off.
    """
    counts = {name: values.shape[-2] for name, values in (tokens or {}).items()}
    rows = token_rows(base.tokenizer_with(counts), [expand(prompt, counts) for prompt in prompts])
    ids = torch.tensor(rows, device=base.device)
    if counts:
        first = len(base.tokenizers[0])
        _refuse_cut_tokens(prompts, counts, [sum(id >= first for id in row) for row in rows], ids.shape[1])
    return ids


def encode_ids(base: Base, ids: Tensor, tokens: Tokens | None = None) -> Tensor:
    """`encode_prompts` on the device alone: ids as `prompt_ids` answers, with the same tokens."""
    encoder = base.text_encoders[0]
    if not tokens:
        return encoder(ids).last_hidden_state
    members = {values.shape[0] for values in tokens.values() if values.dim() == 3} or {1}
    if len(members) > 1:
        raise ValueError(f"tokens come with different numbers of members: {sorted(members)}")
    count = members.pop()
    stacked = torch.cat([v if v.dim() == 3 else v.expand(count, *v.shape) for v in tokens.values()], dim=1)
    with injected(encoder, stacked.to(base.device), len(base.tokenizers[0]), count):
        return encoder(ids.repeat(count, 1)).last_hidden_state


def _refuse_cut_tokens(prompts: Sequence[str], counts: Mapping[str, int], found: Sequence[int], length: int) -> None:
    """A token that a long prompt pushes out of the encoder's window would silently learn nothing.

    Args:
        prompts: N texts.
        counts: vectors a token.
        found: how many trained vectors stand in each prompt's ids.
        length: how many tokens the encoder reads.
    """
    for prompt, there in zip(prompts, found, strict=True):
        wanted = sum(prompt.count(token) * count for token, count in counts.items())
        if there < wanted:
            raise UserError(
                f"the prompt {prompt!r} with its {wanted} trained vectors is longer than the {length} tokens "
                "that the base reads: shorten it, or train fewer vectors"
            )
