"""Prompts to embeddings, with trained vectors in the place of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Conditioning(NamedTuple):
    """What a U-Net is told of N prompts.

    Attributes:
        embeds: [N, T, D], of SDXL both encoders' side by side.
        pooled: [N, P], SDXL's second encoder's embedding of the whole prompt; None elsewhere.
        vae_factor: pixels a latent, from which SDXL is told the picture's size.
        force_zeros: whether SDXL's guidance starts from zeros (see `Family`).
    """

    embeds: Tensor
    pooled: Tensor | None = None
    vae_factor: int = 8
    force_zeros: bool = True

    def expand(self, count: int) -> Conditioning:
        """One prompt's, as often as asked for."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return self._replace(embeds=self.embeds.expand(count, -1, -1), pooled=pooled)

    def repeat(self, count: int) -> Conditioning:
        """All prompts, so many times over."""
        pooled = None if self.pooled is None else self.pooled.repeat(count, 1)
        return self._replace(embeds=self.embeds.repeat(count, 1, 1), pooled=pooled)

    def nothing(self) -> Conditioning:
        """This prompt, an empty one, as guidance takes it: SDXL's mostly starts from zeros, as diffusers' does."""
        if self.pooled is None or not self.force_zeros:
            return self
        return self._replace(embeds=torch.zeros_like(self.embeds), pooled=torch.zeros_like(self.pooled))

    def added(self, latents: Tensor) -> dict[str, Tensor] | None:
        """What SDXL is told beside embeddings: pooled text, and an uncropped picture of latents [N, C, H, W]."""
        if self.pooled is None:
            return None
        side = [length * self.vae_factor for length in latents.shape[-2:]]
        # Made on the device: a copy from the host could not be captured in a CUDA graph.
        sizes = torch.cat([self.pooled.new_full((1,), size) for size in (*side, 0, 0, *side)])
        return {"text_embeds": self.pooled, "time_ids": sizes.expand(len(self.pooled), -1)}


def encode_prompts(base: Base, prompts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
    """The embeddings of `condition_on` alone, [N, T, D] or [V * N, T, D]: all that SD1 and SD2 are told."""
    return condition_on(base, prompts, tokens).embeds


def condition_on(base: Base, prompts: Sequence[str], tokens: Tokens | None = None) -> Conditioning:
    """Embed prompts, once for every member.

    Args:
        base: whose text encoders.
        prompts: N texts; they may hold the names in `tokens`.
        tokens: name -> vectors [n, D], or [V, n, D] for V members at once; D is the encoders' widths added up.

    Returns:
        Of N or V * N prompts, member-major, in the base's dtype.
    """
    if not tokens and all(prompt in base.remembered for prompt in prompts):
        return _stacked([base.remembered[prompt] for prompt in prompts])
    with base.borrowed_text_encoders():
        return condition_on_ids(base, prompt_ids(base, prompts, tokens), tokens)


@torch.no_grad()
def remember(base: Base, prompts: Sequence[str]) -> None:
    """Embed prompts, one by one, so that `condition_on` knows them without text encoders from then on."""
    if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in base.remembered]:
        with base.borrowed_text_encoders():
            for prompt in new:
                base.remembered[prompt] = condition_on_ids(base, prompt_ids(base, [prompt]))


def _stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Of single prompts to one of all."""
    first = conditionings[0]
    pooled = None if first.pooled is None else torch.cat([one.pooled for one in conditionings])  # type: ignore[misc]
    return first._replace(embeds=torch.cat([one.embeds for one in conditionings]), pooled=pooled)


def prompt_ids(base: Base, prompts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
    """What the text encoders read of prompts: int64 [encoders, N, T]; arguments as `condition_on`'s.

    Raises:
        UserError: a prompt is so long that trained vectors would be cut off.
    """
    counts = {name: values.shape[-2] for name, values in (tokens or {}).items()}
    expanded = [expand(prompt, counts) for prompt in prompts]
    rows = [token_rows(base.tokenizer_with(counts, index), expanded) for index in range(len(base.tokenizers))]
    if counts:
        first = len(base.tokenizers[0])
        found = [sum(id >= first for id in row) for row in rows[0]]
        _refuse_cut_tokens(prompts, counts, found, len(rows[0][0]))
    return torch.tensor(rows, device=base.device)


def condition_on_ids(base: Base, ids: Tensor, tokens: Tokens | None = None) -> Conditioning:
    """`condition_on` on the device alone: ids as `prompt_ids` answers, with the same tokens."""
    vectors: Tensor | None = None
    if tokens:
        members = {values.shape[0] for values in tokens.values() if values.dim() == 3} or {1}
        if len(members) > 1:
            raise ValueError(f"tokens come with different numbers of members: {sorted(members)}")
        (count,) = members
        stacked = torch.cat([v if v.dim() == 3 else v.expand(count, *v.shape) for v in tokens.values()], dim=1)
        vectors = stacked.to(base.device)  # [V, n, D]
    answers = []
    for index, (encoder, width) in enumerate(zip(base.text_encoders, base.text_widths, strict=True)):
        own = None
        if vectors is not None:
            own, vectors = vectors[..., :width], vectors[..., width:]
        answers.append(_read(encoder, ids[index], own, len(base.tokenizers[index]), len(base.text_encoders) > 1))
    if len(answers) == 1:
        return Conditioning(answers[0].last_hidden_state, vae_factor=base.vae_factor)
    embeds = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
    return Conditioning(embeds, answers[-1].text_embeds, base.vae_factor, base.info.force_zeros)


def _read(encoder: nn.Module, ids: Tensor, vectors: Tensor | None, first: int, layers: bool) -> Any:
    """What a text encoder answers to ids [N, T] for every member's vectors [V, n, D]; `layers`: with every layer's."""
    if vectors is None:
        return encoder(ids, output_hidden_states=layers)
    with injected(encoder, vectors, first, len(vectors)):
        return encoder(ids.repeat(len(vectors), 1), output_hidden_states=layers)


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
