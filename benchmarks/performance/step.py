"""`step`: one zeroth-order step, all members in one batched forward, beside the same members one after the other."""

from __future__ import annotations

import statistics

import torch

from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import encode_prompts
from mep_lightning.data import sample_latents
from mep_lightning.draws import Draw
from mep_lightning.estimators import RandomGradientEstimator

CASES = {"int8": (1, 2, 4, 8), "fp32": (2,)}


def one_after_the_other(module: PersonalizationModule, members: torch.Tensor, draw: Draw) -> torch.Tensor:
    """What is commonly run: a text encoding and a full forward a member."""
    base, losses = module.base, []
    for member in members:
        embeds = encode_prompts(base, draw.prompts, module.adapter.tokens(member))
        predicted = base.unet(draw.noisy, draw.timestep, embeds).sample
        losses.append((predicted.float() - draw.target).pow(2).mean())
    return torch.stack(losses)


def build(precision: str, n: int, device: str = "cpu") -> tuple[PersonalizationModule, Draw]:
    module = PersonalizationModule(
        precision=precision, adapter=TokenEmbedding(init="ball"), estimator=RandomGradientEstimator(n=n, mu=1e-3)
    )
    base = module.load(device)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 4, 16, 16, generator=generator)
    latents = sample_latents(mean, torch.zeros_like(mean), torch.zeros_like(mean), 1.0)
    noise, timestep = torch.randn(mean.shape, generator=generator), torch.tensor([700])
    noisy = base.scheduler.add_noise(latents, noise, timestep).to(base.device, base.dtype)
    return module, Draw(noisy, timestep.to(base.device), noise.to(base.device), ["a photo of a <sks> ball"])


def run(rounds: int = 15, device: str = "cpu") -> list[Row]:
    rows = []
    for precision, counts in CASES.items():
        for n in counts:
            module, draw = build(precision, n, device)
            estimator, theta = module.estimator, module.adapter.theta

            def batched(module=module, draw=draw, estimator=estimator, theta=theta):
                return estimator.estimate(lambda m: module.losses(m, draw), theta, step=1)

            def sequential(module=module, draw=draw, estimator=estimator, theta=theta):
                return estimator.estimate(lambda m: one_after_the_other(module, m, draw), theta, step=1)

            ours, theirs = batched(), sequential()
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)  # the same losses, or no figure
            seconds = interleaved({"batched": batched, "sequential": sequential}, rounds)
            fast, slow = seconds["batched"], seconds["sequential"]
            rows.append(
                row(
                    "step",
                    f"tiny {precision} RGE n={n}",
                    "seconds a step",
                    statistics.median(fast),
                    "s",
                    statistics.median(slow),
                    median_ratio(slow, fast),
                )
            )
            print(f"{rows[-1]['case']}: {rows[-1]['ratio']:.2f}x", flush=True)
    return rows
