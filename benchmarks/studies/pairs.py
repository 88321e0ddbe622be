"""`pairs`: would two draws that belong together leave less of a gradient to chance than two that do not?

Antithetic pairs (noise and its negative, timestep t and its mirror image) help as far as their gradients' deviations
are negatively correlated; a control variate (the gradient of a draw that is reused) as far as they are strongly
correlated at all. Measured along Textual Inversion's path, on subjects of the tiny world that are not reported.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.rows import Row, row
from benchmarks.studies.conditioning import gradient_of, trained

STEPS = 60


def run(subjects: int = 4, draws: int = 100) -> list[Row]:
    """Correlations of the deviations of a draw's gradient and its partner's from the mean gradient."""
    found: dict[str, list[float]] = {}
    for index in range(subjects):
        module, data = trained(index, STEPS)
        assert module.base is not None
        scheduler = module.base.scheduler
        last = len(scheduler.alphas_cumprod) - 1
        gradients: dict[str, list[Tensor]] = {}
        for i in range(draws):
            batch = data.batch(i)
            draw, other = module.draw_at(batch, 5_000 + i), module.draw_at(batch, 9_000 + i)
            noise, timestep = draw.target, draw.timestep
            kept, added = (scheduler.alphas_cumprod[timestep].sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt())
            latents = (draw.noisy - added.view(-1, 1, 1, 1) * noise) / kept.view(-1, 1, 1, 1)

            partners = {
                "itself": (noise, timestep),
                "another draw of the photo": (other.target, other.timestep),
                "the negative noise": (-noise, timestep),
                "the mirrored timestep": (noise, last - timestep),
                "the negative noise at the mirrored timestep": (-noise, last - timestep),
                "the same timestep, another noise": (other.target, timestep),
                "the same noise, another timestep": (noise, other.timestep),
            }
            for name, (epsilon, t) in partners.items():
                partner = replace(draw, noisy=scheduler.add_noise(latents, epsilon, t), target=epsilon, timestep=t)
                gradients.setdefault(name, []).append(gradient_of(module, partner))
        stacked = {name: torch.stack(some) for name, some in gradients.items()}
        mean = torch.cat(list(stacked.values())).mean(0)
        own = stacked["itself"] - mean
        spread = own.square().sum(1).mean()
        for name, some in stacked.items():
            found.setdefault(name, []).append(((own * (some - mean)).sum(1).mean() / spread).item())
        found.setdefault("the mean's squared length", []).append((mean.square().sum() / spread).item())
        print(f"subject {index}: { ({name: round(values[-1], 3) for name, values in found.items()}) }", flush=True)
    return [
        row("pairs", name, "share of a draw's variance", statistics.mean(values), "")
        | {"spread": statistics.stdev(values)}
        for name, values in found.items()
    ]
