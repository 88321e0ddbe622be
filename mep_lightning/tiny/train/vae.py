"""Stage 1: the autoencoder, 64x64 pixels to 4x16x16 latents."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mep_lightning.tiny.train.loop import Ema, fit
from mep_lightning.tiny.world import random_scenes, render


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def psnr(reconstruction: Tensor, image: Tensor) -> float:
    """Peak signal to noise in dB of images in [-1, 1], averaged over the batch's squared error."""
    return 10 * math.log10(4 / (reconstruction.clamp(-1, 1) - image).pow(2).mean().item())


def train_vae(out: Path, steps: int = 4000, batch: int = 16, device: str = "cpu") -> AutoencoderKL:
    """Squared error, plus absolute error on edges (small marks survive), plus a whisper of KL."""
    torch.manual_seed(0)
    vae = build_vae().to(device)
    ema = Ema(vae, 0.999)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(1_000_000 + step)
        image = render(random_scenes(batch, generator)[0]).to(device) * 2 - 1
        posterior = vae.encode(image).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample.float()
        error = (reconstruction - image).pow(2).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(reconstruction), edges(image), strict=True))
        loss = error + 0.1 * edge + 1e-6 * posterior.kl().mean()
        return loss, {"psnr": psnr(reconstruction.detach(), image)}

    fit("vae", vae, loss_fn, steps=steps, lr=1.5e-3, out=out, ema=ema)
    ema.copy_to(vae)
    return vae.eval()
