"""`methods`: what a training step and a denoising step of every method cost at a base's real size, made-up weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch

from benchmarks import made_up
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import LoRA
from mep_lightning.commands.budget import available_precisions, recipe
from mep_lightning.estimation import give_gradient
from mep_lightning.estimators import Estimator
from mep_lightning.plan.rehearsal import PROMPT, branches, draw_of


class Case(NamedTuple):
    """A recipe on a base, and with what."""

    recipe: str
    precision: str = "int8"
    checkpointing: bool | None = None
    cuda_graph: bool = False


CASES: dict[str, Case] = {
    "zoodip": Case("zoodip"),
    "zoodip_fast": Case("zoodip_fast"),
    "gf_ti": Case("gf_ti"),
    "textual_inversion": Case("textual_inversion"),
    "textual_inversion_lite": Case("textual_inversion_lite"),
    "lora": Case("lora"),
    "lora, checkpointing": Case("lora", checkpointing=True),
    "qlora": Case("qlora", "int4"),
    "peqa": Case("peqa"),
    "tuneqdm": Case("tuneqdm"),
    "hollowed_net": Case("hollowed_net"),
    "selective": Case("selective"),
}
ON_GPU: dict[str, Case] = {
    "zoodip, graph": Case("zoodip", cuda_graph=True),
    "zoodip_fast, graph": Case("zoodip_fast", cuda_graph=True),
    "gf_ti, graph": Case("gf_ti", cuda_graph=True),
    "dreambooth": Case("dreambooth", "fp32"),
}
"""What needs a GPU, and what fits beside the others there alone."""
BESIDE = "int8 zoodip"
"""What the others' training steps stand beside."""
MERGED = "lora, checkpointing"
"""Whose LoRA is merged for drawing, once its training is timed."""
ALONE = "int8 the base alone"

Sides = dict[str, Callable[[], object]]


def run(name: str, rounds: int = 5, device: str = "cpu") -> list[Row]:
    """Seconds of every method's steps, in turn in one process: first of training, then of drawing."""
    with ExitStack() as stack:
        modules, training = {}, {}  # type: tuple[dict[str, PersonalizationModule], Sides]
        on_gpu = torch.device(device).type == "cuda"
        for case, about in (CASES | (ON_GPU if on_gpu else {})).items():
            if about.precision not in available_precisions():
                continue
            modules[case] = module = recipe(about.recipe)(about.precision, about.checkpointing)
            module.cuda_graph = about.cuda_graph
            base = made_up.load(made_up.found(name, about.precision, device), module, device)
            module.take(base)
            stack.callback(base.close)
            for phase, estimator, resolution in branches(module, base.resolution):
                branch = "" if module.selector is None else f", {'low' if phase == 'low step' else 'high'} resolution"
                training[f"{about.precision} {case}{branch}"] = _training(module, estimator, resolution)
        rows = _timed(name, "seconds a training step", training, BESIDE, rounds)
        merged = modules[MERGED].adapter
        assert isinstance(merged, LoRA)
        merged.merge_()
        drawing = {
            ALONE: _drawing(modules["zoodip"]),
            "int8 LoRA beside the weights": _drawing(modules["lora"]),
            "int8 LoRA merged": _drawing(modules[MERGED]),
            "int8 hollowed_net, two paths": _drawing(modules["hollowed_net"]),
            "int8 hollowed_net, one path": _drawing(modules["hollowed_net"], two_paths=False),
        }
        return rows + _timed(name, "seconds a denoising step", drawing, ALONE, rounds)


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


def _timed(base: str, metric: str, sides: Sides, beside: str, rounds: int) -> list[Row]:
    seconds = interleaved(sides, rounds, warmup=1)
    rows = []
    for case, own in seconds.items():
        ratio = median_ratio(seconds[beside], own)
        baseline = statistics.median(seconds[beside])
        rows.append(row("methods", f"{base} {case}", metric, statistics.median(own), "s", baseline, ratio))
        print(f"{case}: {statistics.median(own):.3g} s, {ratio:.2f}x as fast as {beside}", flush=True)
    return rows
