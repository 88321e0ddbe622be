"""`methods`: what a training step and a denoising step of every method cost at a base's real size, made-up weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from benchmarks import made_up
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import LoRA
from mep_lightning.commands.budget import recipe
from mep_lightning.estimation import give_gradient
from mep_lightning.estimators import Estimator
from mep_lightning.plan.rehearsal import PROMPT, branches, draw_of

RECIPES: dict[str, tuple[str, bool | None]] = {
    "zoodip": ("zoodip", None),
    "zoodip_fast": ("zoodip_fast", None),
    "gf_ti": ("gf_ti", None),
    "textual_inversion": ("textual_inversion", None),
    "textual_inversion_lite": ("textual_inversion_lite", None),
    "lora": ("lora", None),
    "lora, checkpointing": ("lora", True),
    "peqa": ("peqa", None),
    "tuneqdm": ("tuneqdm", None),
    "hollowed_net": ("hollowed_net", None),
    "selective": ("selective", None),
}
"""Which recipe, and whether with checkpointing; all of them on the base in int8."""
BESIDE = "zoodip"
"""What the others' training steps stand beside."""
MERGED = "lora, checkpointing"
"""Whose LoRA is merged for drawing, once its training is timed."""
ALONE = "the base alone"

Sides = dict[str, Callable[[], object]]


def run(name: str, rounds: int = 5, device: str = "cpu") -> list[Row]:
    """Seconds of every method's steps, in turn in one process: first of training, then of drawing."""
    with ExitStack() as stack:
        modules, training = {}, {}  # type: tuple[dict[str, PersonalizationModule], Sides]
        for case, (method, checkpointing) in RECIPES.items():
            modules[case] = module = recipe(method)("int8", checkpointing)
            base = made_up.load(made_up.found(name, "int8", device), module)
            module.take(base)
            stack.callback(base.close)
            for phase, estimator, resolution in branches(module, base.resolution):
                branch = "" if module.selector is None else f", {'low' if phase == 'low step' else 'high'} resolution"
                training[f"{case}{branch}"] = _training(module, estimator, resolution)
        rows = _timed(f"{name} int8", "seconds a training step", training, BESIDE, rounds)
        merged = modules[MERGED].adapter
        assert isinstance(merged, LoRA)
        merged.merge_()
        drawing = {
            ALONE: _drawing(modules[BESIDE]),
            "LoRA beside the weights": _drawing(modules["lora"]),
            "LoRA merged": _drawing(modules[MERGED]),
            "hollowed_net, two paths": _drawing(modules["hollowed_net"]),
            "hollowed_net, one path": _drawing(modules["hollowed_net"], two_paths=False),
        }
        return rows + _timed(f"{name} int8", "seconds a denoising step", drawing, ALONE, rounds)


def _training(module: PersonalizationModule, estimator: Estimator, resolution: int) -> Callable[[], object]:
    """Draw, estimate, step; a hollow's activation is made up."""
    assert module.base is not None
    draw = draw_of(module, estimator, made_up.batch(module.base, resolution))
    optimizer: Any = module.configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        give_gradient(module, estimator, draw, optimizer)
        optimizer.step()

    return step


@torch.no_grad()
def _drawing(module: PersonalizationModule, two_paths: bool = True) -> Callable[[], object]:
    """One guided denoising step of one picture, as a denoising loop calls the U-Net."""
    base = module.base
    assert base is not None
    side = base.resolution // base.vae_factor
    told = module.condition_on([module.named(PROMPT)] * 2)
    noise = torch.randn(2, base.unet.config.in_channels, side, side).to(base.device, base.dtype)
    times = torch.full((2,), 500, device=base.device)

    @torch.no_grad()
    def step() -> None:
        with module.drawing() if two_paths else nullcontext():
            base.unet(noise, times, encoder_hidden_states=told.embeds, added_cond_kwargs=told.added(noise))

    return step


def _timed(about: str, metric: str, sides: Sides, beside: str, rounds: int) -> list[Row]:
    seconds = interleaved(sides, rounds, warmup=1)
    rows = []
    for case, own in seconds.items():
        ratio = median_ratio(seconds[beside], own)
        baseline = statistics.median(seconds[beside])
        rows.append(row("methods", f"{about} {case}", metric, statistics.median(own), "s", baseline, ratio))
        print(f"{case}: {statistics.median(own):.2f} s, {ratio:.2f}x as fast as {beside}", flush=True)
    return rows
