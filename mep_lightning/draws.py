"""What one step trains on: noise, timesteps and texts, a pure function of (seed, step, batch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mep_lightning.bases import Base
from mep_lightning.data import sample_latents
from mep_lightning.seeding import TOLD_APART, seeded
from mep_lightning.timesteps import TimestepSampler

Moments = tuple[Tensor, Tensor]
"""Mean and std of latents, fp32 [B, C, H, W], unscaled."""


@dataclass(frozen=True)
class Draw:
    """What one step trains on.

    Attributes:
        noisy: noised latents, [B, C, H, W].
        timestep: int64 [B].
        target: what the U-Net should predict, the noise or v, fp32 [B, C, H, W].
        prompts: B texts that name the subject.
        high: whether the step takes the branch of high resolution.
        priors: how many of the B, the last ones, are of the class and not of the subject.
        activation: what a hollow of the U-Net would answer, [B, C', H', W'], where there is one.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    prompts: list[str]
    high: bool = True
    priors: int = 0
    activation: Tensor | None = None


def step_generator(seed: int, step: int) -> Generator:
    """A generator that is a pure function of (seed, step)."""
    return seeded((seed % TOLD_APART * 0x9E3779B1 + step * 0x85EBCA77 + 0x27D4EB2F) % 2**63, seed // TOLD_APART)


def noised(
    base: Base,
    moments: Moments,
    generator: Generator,
    timestep: Tensor | None,
    sampler: TimestepSampler,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, timesteps and target.

    Args:
        base: whose schedule.
        moments: of the photos' latents, on the base's device.
        generator: of the step.
        timestep: int64 [B], where they are drawn already.
        sampler: draws them after the noise, where not.

    Returns:
        noisy [B, C, H, W] in the base's dtype, int64 [B], target fp32 [B, C, H, W].
    """
    mean, std = moments
    latents = sample_latents(mean, std, _normal(mean, generator), base.scaling_factor)
    noise = _normal(mean, generator)
    timestep = (sampler.sample(len(mean), generator) if timestep is None else timestep).to(mean.device)
    noisy = base.scheduler.add_noise(latents, noise, timestep)
    v_prediction = base.info.prediction == "v_prediction"
    target = base.scheduler.get_velocity(latents, noise, timestep) if v_prediction else noise
    return noisy.to(base.dtype), timestep, target.float()


def _normal(like: Tensor, generator: Generator) -> Tensor:
    """fp32 normals of a tensor's shape, drawn on the CPU so that every device sees the same."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)
