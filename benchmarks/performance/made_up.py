"""Bases of a real size whose weights are made up: memory and speed do not ask what they are."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mep_lightning import PersonalizationModule
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base, BaseFolder
from mep_lightning.bases.families import describe
from mep_lightning.bases.load import activation_dtype, assemble
from mep_lightning.bases.skeleton import Maker, architecture, made_up, tokenizer
from mep_lightning.plan.rehearsal import PROMPT, WORD, made_up_batch


def found(name: str, precision: str, device: str, offload: str = "none") -> BaseFolder:
    """A base as `open_base` finds one."""
    folder, where = architecture(name), torch.device(device)
    info = describe(folder, name)
    return BaseFolder(
        name=name,
        folder=folder,
        info=info,
        precision=precision,
        dtype=activation_dtype(precision, where, info.family),
        device=where,
        offload=offload,
    )


def load(base: BaseFolder, module: PersonalizationModule, made_on: str = "cpu") -> Base:
    """The base that a module will train on, its text encoders gone where it trains no text.

    Weights are made where `made_on` says: on the CPU as a file's would come, or at once where they go.
    """
    named_(module)
    prompts = None if module.adapter.trains_text else [module.named(PROMPT)]
    return assemble(
        base,
        tensors=lambda part, _: made_up(part, random_weights_on(made_on)),
        tokenizer=tokenizer,
        vae=None,
        prompts=prompts,
    )


def named_(module: PersonalizationModule) -> None:
    """Give a module a subject of a word that every base knows."""
    module.class_word = WORD
    for part in module.adapter.parts:
        if isinstance(part, TokenEmbedding):
            part.init = WORD


def batch(base: Base, resolution: int) -> dict[str, object]:
    """A photo's latents, random."""
    made = made_up_batch(base, resolution)
    return made | {"mean": torch.randn(made["mean"].shape), "std": torch.zeros(made["std"].shape)}


def random_weights_on(device: str | torch.device) -> Maker:
    """Makes weights up on a device: so small that activations stay finite through a hundred layers, the same 4 million
    values again and again."""
    values = _normals(torch.device(device))

    def make(_: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        return values.repeat(-(-count // len(values)))[:count].view(shape)

    return make


@functools.cache
def _normals(device: torch.device) -> Tensor:
    return torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).half().to(device)
