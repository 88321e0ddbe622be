"""`branches`: where each branch of selective optimisation points, beside the gradient at high resolution.

A LoRA of the embedded base is trained a little by backpropagation at high resolution. From there, at every timestep,
the mean of exact gradients over many draws of noise and photo is what a step should go along; the branches are single
draws of what a step does go along.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row, row
from benchmarks.trained.quality import photos_of, train
from benchmarks.trained.variants import LORA, SELECTIVE, resolve
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.draws import Draw
from mep_lightning.estimators import Backprop, SPSAEstimator
from mep_lightning.tiny.subjects import subject

TIMESTEPS = (100, 300, 500, 700, 900)
SIDES = (64, 48, 32)
STEPS = 100


def run(draws: int = 64) -> list[Row]:
    """Cosines with the mean gradient at high resolution: of one draw's exact gradient there, of the mean and of one
    draw at lower resolutions, and of zeroth-order estimates."""
    module, data = _trained()
    rows = []
    for timestep in TIMESTEPS:
        means = {side: _mean(list(_gradients(module, data, side, timestep, range(draws)))) for side in SIDES}
        goal = means[SIDES[0]]
        ways: dict[str, list[Tensor]] = {}
        for side in SIDES:
            # Draws that are in no mean, so that none points along itself.
            ways[f"backpropagation at {side} px, one draw"] = list(
                _gradients(module, data, side, timestep, range(draws, draws + 8))
            )
            if side != SIDES[0]:
                ways[f"backpropagation at {side} px, mean of {draws}"] = [means[side]]
        for n in (1, 8):
            estimator = SPSAEstimator(n=n, mu=1e-3)
            ways[f"zeroth order at {SIDES[0]} px, n={n}, one draw"] = list(
                _gradients(module, data, SIDES[0], timestep, range(draws, draws + 8), estimator)
            )
        for way, gradients in ways.items():
            cosine = statistics.mean(torch.cosine_similarity(one, goal, dim=0).item() for one in gradients)
            case = f"t={timestep}, {way}"
            rows.append(row("branches", case, "cosine with the mean gradient at high resolution", cosine, ""))
            print(f"{case}: {cosine:.4f}", flush=True)
    rows.append(row("branches", "LoRA", "dimensions", float(goal.numel()), ""))
    return rows


def _trained() -> tuple[PersonalizationModule, SubjectData]:
    who = subject(0)
    with photos_of(who) as folder:
        data = SubjectData(folder, class_word=who.class_word, seed=0)
        settings = resolve(LORA | {"max_steps": STEPS, "lr": resolve(SELECTIVE)["lr"]})
        module = train(settings, data, 0, folder)
        data.encode(module.base, list(SIDES))
    return module, data


def _gradients(
    module: PersonalizationModule,
    data: SubjectData,
    side: int,
    timestep: int,
    seeds: range,
    estimator: Any = None,
) -> Iterator[Tensor]:
    """One for every seed, all factors in a row."""
    trained = module.adapter.numbered()
    for seed in seeds:
        draw = _draw(module, data, side, timestep, seed)
        if estimator is None:
            module.adapter.zero_grad()
            Backprop().backward(lambda members, d=draw: module.losses(members, d), trained.values())
            yield torch.cat([theta.grad.flatten() for theta in trained.values() if theta.grad is not None]).clone()
        else:
            weights, _ = estimator.weigh(lambda members, d=draw: module.losses(members, d), 1, seed, trained)
            members = estimator.around(seed)
            noises = [torch.stack(list(members.noise_of(theta, key))).flatten(1) for key, theta in trained.items()]
            yield weights @ torch.cat(noises, dim=1)


def _draw(module: PersonalizationModule, data: SubjectData, side: int, timestep: int, seed: int) -> Draw:
    batch = data.batch(seed)
    mean, std = data.at(side, batch["rows"])
    generator = torch.Generator().manual_seed(seed)
    moments = {"mean": mean, "std": std, "prompts": batch["prompts"]}
    return module.draw_for(moments, True, generator, torch.tensor([timestep]))


def _mean(gradients: list[Tensor]) -> Tensor:
    return torch.stack(gradients).mean(0)
