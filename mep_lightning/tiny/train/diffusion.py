"""Stage 2: the U-Net and its text encoder, trained together on cached latents with SD1.5's noise schedule."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mep_lightning.bases.tokens import token_ids
from mep_lightning.tiny.captions import scene_caption
from mep_lightning.tiny.names import LOOK_SIZE, named_scenes
from mep_lightning.tiny.train.loop import Ema, device_of, fit, in_bf16
from mep_lightning.tiny.train.naming import NamingTextEncoder
from mep_lightning.tiny.train.text import build_text_encoder
from mep_lightning.tiny.world import Scenes, random_scenes, render

SCENES_PER_SEED = 500
UNCONDITIONAL = 0.1
SNR_GAMMA = 5.0


def build_scheduler() -> DDPMScheduler:
    """SD1.5's schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    """SD1.5's layout, cross-attention at every resolution, 7.7 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
    )


class CachedScenes:
    """Latents of scenes, `count` random and `named` of named looks, encoded once and kept on disk; captions are drawn
    anew each time."""

    def __init__(self, vae: AutoencoderKL, out: Path, count: int = 40_000, named: int = 25_000):
        kinds = [random_scenes] * (count // SCENES_PER_SEED) + [named_scenes] * (named // SCENES_PER_SEED)
        drawn = [draw(SCENES_PER_SEED, self._generator(i)) for i, draw in enumerate(kinds)]
        self.parts: list[tuple[Scenes, dict[str, Tensor]]] = drawn
        path = out / "latents.safetensors"
        if not path.exists():
            save_file(self._encode(vae), path)
        cached = load_file(path)
        self.mean, self.std = cached["mean"], cached["std"]  # [N, 4, 16, 16] fp16

    @staticmethod
    def _generator(part: int) -> torch.Generator:
        return torch.Generator().manual_seed(2_000_000 + part)

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL) -> dict[str, Tensor]:
        means, stds, device = [], [], device_of(vae)
        for scenes, _ in self.parts:
            images = render(scenes) * 2 - 1
            for chunk in images.split(50):
                with in_bf16(device):
                    posterior = vae.encode(chunk.to(device)).latent_dist
                means.append(posterior.mean.half().cpu())
                stds.append(posterior.std.half().cpu())
        return {"mean": torch.cat(means), "std": torch.cat(stds)}

    def scaling_factor(self) -> float:
        """One over the latents' standard deviation, as the VAE's config keeps it."""
        return round(1 / self.mean[:2000].float().std().item(), 4)

    def draw(self, batch: int, generator: torch.Generator, rng: random.Random) -> tuple[Tensor, list[str], Tensor]:
        """Latents [B, 4, 16, 16] (not yet scaled), captions, some of them empty for guidance, and looks [B, LOOK_SIZE]:
        whom a caption's name means, 0 where it has none."""
        index = torch.randint(len(self.mean), (batch,), generator=generator)
        mean, std = self.mean[index].float(), self.std[index].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        captions, meant = [], torch.zeros(batch, LOOK_SIZE)
        for row, i in enumerate(index.tolist()):
            scenes, named = self.parts[i // SCENES_PER_SEED]
            empty = rng.random() < UNCONDITIONAL
            captions.append("" if empty else scene_caption(scenes, named, i % SCENES_PER_SEED, rng))
            if "look" in named and not empty:
                meant[row] = named["look"][i % SCENES_PER_SEED]
        return latents, captions, meant


def train_diffusion(
    data: CachedScenes,
    scaling_factor: float,
    tokenizer: CLIPTokenizer,
    out: Path,
    steps: int = 12_000,
    batch: int = 64,
    stop_at: int | None = None,
    device: str = "cpu",
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Noise prediction, weighted by min-SNR-5 (Hang et al. 2023, arXiv 2303.09556, eq. 5 for epsilon)."""
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp_max(SNR_GAMMA) / snr
    torch.manual_seed(1)
    unet, naming = build_unet(), NamingTextEncoder(build_text_encoder(tokenizer), tokenizer)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a fused attention's backward is slower at these shapes there
    model = nn.ModuleDict({"unet": unet, "text": naming}).to(device)
    ema = Ema(model, 0.999)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        generator, rng = torch.Generator().manual_seed(3_000_000 + step), random.Random(step)
        latents, captions, meant = data.draw(batch, generator, rng)
        latents = latents * scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, t)
        embeds = naming(token_ids(tokenizer, captions).to(device), meant.to(device))
        predicted = unet(noisy.to(device), t.to(device), embeds).sample.float()
        error = (predicted - noise.to(device)).pow(2).mean((1, 2, 3))
        by_name = error[meant.any(1).to(device)]
        seen = {"eps": error.mean().item(), "by name": by_name.mean().item()}
        return (weights[t].to(device) * error).mean(), seen

    fit("diffusion", model, loss_fn, steps=steps, lr=8e-4, out=out, ema=ema, save_every=250, stop_at=stop_at)
    ema.copy_to(model)
    naming.write_names()
    return unet.eval(), naming.text_encoder.eval()
