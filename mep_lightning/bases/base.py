"""A loaded, frozen base model and its parts; no nn.Module, as Lightning must not move, cast or checkpoint it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from mep_lightning.bases.families import Family
from mep_lightning.bases.tokens import with_tokens
from mep_lightning.bases.weights import load_vae


@dataclass(eq=False)
class Base:
    """The frozen model that an adapter personalises.

    Attributes:
        name: as the user gave it ("tiny", a folder, a hub id).
        folder: where its files lie.
        info: family, native resolution, prediction type.
        precision: "fp32", "bf16", "fp16", "int8" or "int4" (what the weights are kept in).
        dtype: what activations are computed in.
        device: where it lives.
        unet: the U-Net.
        text_encoders: one for SD1 and SD2, two for SDXL.
        tokenizers: one a text encoder.
        vae: the autoencoder, None once released.
        scheduler: the training noise schedule.
        scaling_factor: what scales the autoencoder's latents to unit variance.
    """

    name: str
    folder: Path
    info: Family
    precision: str
    dtype: torch.dtype
    device: torch.device
    unet: UNet2DConditionModel
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    vae: AutoencoderKL | None
    scheduler: DDPMScheduler
    scaling_factor: float
    _enlarged: dict[tuple[tuple[str, int], ...], Any] = field(default_factory=dict, repr=False)

    @property
    def address(self) -> str:
        """Where it is found again from anywhere on this machine: its name, or a local folder's absolute path."""
        is_local = self.name != "tiny" and Path(self.name).expanduser().is_dir()
        return str(self.folder.resolve()) if is_local else self.name

    @property
    def family(self) -> str:
        return self.info.family

    @property
    def resolution(self) -> int:
        return self.info.resolution

    @property
    def vae_factor(self) -> int:
        return self.info.vae_factor

    def modules(self) -> list[nn.Module]:
        """All parts that hold weights now."""
        return [m for m in (self.unet, *self.text_encoders, self.vae) if m is not None]

    def tokenizer_with(self, counts: Mapping[str, int]) -> Any:
        """The tokenizer that also knows new tokens, `counts` vectors each; kept, as copying a vocabulary takes long."""
        if not counts:
            return self.tokenizers[0]
        key = tuple(counts.items())
        if key not in self._enlarged:
            self._enlarged[key] = with_tokens(self.tokenizers[0], counts)
        return self._enlarged[key]

    def release_vae(self) -> None:
        """Free the autoencoder: after the photos are encoded, training never needs it."""
        self.vae = None

    @contextmanager
    def borrowed_vae(self) -> Iterator[AutoencoderKL]:
        """The autoencoder for the length of a `with`; read from disk again, and freed, where it had been released."""
        kept = self.vae
        self.vae = kept if kept is not None else load_vae(self.folder, self.device, self.dtype)
        try:
            yield self.vae
        finally:
            self.vae = kept

    def pipeline(self, vae: AutoencoderKL | None) -> StableDiffusionPipeline:
        """A diffusers pipeline over these very parts (no copies); without a VAE it gives latents."""
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
