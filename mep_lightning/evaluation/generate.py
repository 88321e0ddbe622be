"""Pictures from prompts and seeds: a diffusers pipeline over the base's own parts, in as little memory as may be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from mep_lightning import defaults
from mep_lightning.errors import UserError
from mep_lightning.phases import phase
from mep_lightning.seeding import seeded

if TYPE_CHECKING:
    from mep_lightning.bases import Conditioning


SAMPLING: dict[str, Any] = {"sampling_steps": 25, "guidance": 7.5, "sampling_batch": 1}
"""How a module is sampled whose method and base have no defaults."""


@torch.no_grad()
def generate(
    module_or_base: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    resolution: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture for each prompt and seed, by DPM-Solver++ with classifier-free guidance.

    A picture depends on its own prompt and seed and not on its neighbours or `batch_size` (up to rounding), nor on the
    device's random numbers: noise comes from a CPU generator a picture. Global random state is neither read nor set.
    The VAE is in memory only after the last denoising step, on a GPU in the U-Net's place, and decodes one picture at a
    time.

    Args:
        module_or_base: a set-up `PersonalizationModule`, whose trained token the prompts may name, or a plain `Base`.
        prompts: N texts, the subject already filled in.
        seeds: N numbers.
        steps: denoising steps; by default those of the module's method on its base, and 25 for a plain base.
        guidance: the guidance scale w, by default as for steps, and 7.5; 1 or less switches guidance off and halves the
            work.
        batch_size: how many pictures are denoised at once.
        resolution: pixels a side; the base's own by default.
        progress: called with (pictures denoised, N) after every batch.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts need as many seeds, and {len(seeds)} were given.")
    known = SAMPLING | defaults.of(module_or_base)
    steps = known["sampling_steps"] if steps is None else steps
    guidance = known["guidance"] if guidance is None else guidance
    is_module = hasattr(module_or_base, "condition_on")
    base = module_or_base.base if is_module else module_or_base
    resolution = base.resolution if resolution is None else resolution
    if resolution % base.vae_factor:
        raise UserError(f"The resolution {resolution} is not a multiple of {base.vae_factor}: choose one that is.")
    if hasattr(module_or_base, "remember"):
        module_or_base.remember(["", *prompts] if guidance > 1 else prompts)
    with phase("sample"):
        with module_or_base.drawing() if hasattr(module_or_base, "drawing") else nullcontext():
            latents = _denoise(
                base,
                module_or_base.condition_on if is_module else lambda texts: _condition_on(base, texts),
                prompts,
                [_noise(base, seed, resolution) for seed in seeds],
                resolution,
                steps,
                guidance,
                batch_size,
                progress,
            )
        return _decode(base, latents)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside again, every submodule is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _noise(base: Any, seed: int, resolution: int) -> Tensor:
    """A picture's initial noise, [C, h, w], fp32 on the CPU."""
    side = resolution // base.vae_factor
    generator = seeded(seed)
    return torch.randn((base.unet.config.in_channels, side, side), generator=generator, dtype=torch.float32)


def _denoise(
    base: Any,
    condition_on: Callable[[list[str]], Conditioning],
    prompts: Sequence[str],
    noise: list[Tensor],
    resolution: int,
    steps: int,
    guidance: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """Noise to clean latents, a list of [C, h, w]."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = base.pipeline(None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    unconditional = condition_on([""]).nothing() if guidance > 1 else None  # of one prompt
    latents: list[Tensor] = []
    with evaluating(base.unet):
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            told = condition_on(texts)
            result = pipeline(
                **_arguments("", told),
                **({} if unconditional is None else _arguments("negative_", unconditional.expand(len(texts)))),
                **({} if told.pooled is None else _size(resolution)),
                latents=torch.stack(noise[start : start + batch_size]).to(base.device, base.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                return_dict=False,
            )
            latents.extend(result[0].unbind())
            if progress is not None:
                progress(len(latents), len(prompts))
    return latents


def _arguments(prefix: str, told: Conditioning) -> dict[str, Tensor]:
    """A conditioning as diffusers' pipelines take it."""
    pooled = {} if told.pooled is None else {f"{prefix}pooled_prompt_embeds": told.pooled}
    return {f"{prefix}prompt_embeds": told.embeds, **pooled}


def _size(resolution: int) -> dict[str, Any]:
    """What SDXL's pipeline tells its U-Net of the picture: as in training, all of one."""
    size = (resolution, resolution)
    return {"height": resolution, "width": resolution, "original_size": size, "target_size": size}


def _condition_on(base: Any, prompts: list[str]) -> Conditioning:
    """Prompts for a base without an adapter."""
    from mep_lightning.bases import condition_on

    return condition_on(base, prompts, None)


def _decode(base: Any, latents: list[Tensor]) -> list[Image.Image]:
    with base.parked():
        return _decode_alone(base, latents)  # the autoencoder is gone when it returns


def _decode_alone(base: Any, latents: list[Tensor]) -> list[Image.Image]:
    images = []
    with base.borrowed_vae("decoder") as vae:
        for latent in latents:
            scaled = latent[None].to(base.device, vae.dtype) / vae.config.scaling_factor
            images.append(_to_image(vae.decode(scaled, return_dict=False)[0][0]))
    return images


def _to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a picture."""
    pixels = pixels.float()
    if not math.isfinite(pixels.sum()):
        warnings.warn("A generated picture holds numbers that are not finite; it is shown grey there.", stacklevel=2)
        pixels = pixels.nan_to_num(0, 0, 0)
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
