"""`methods`: what a training step and a denoising step of every method cost at a base's real size, made-up weights."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.performance import made_up
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import LoRA
from mep_lightning.commands.budget import available_precisions, recipe
from mep_lightning.draws import Draw
from mep_lightning.estimation import give_gradient
from mep_lightning.estimators import Estimator
from mep_lightning.plan.rehearsal import PROMPT, branches, draw_of


class Case(NamedTuple):
    """A recipe on a base, and with what."""

    recipe: str
    precision: str = "int8"
    checkpointing: bool | None = None
    cuda_graph: bool | Literal["auto"] = "auto"


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
AS_SHIPPED: dict[str, Case] = {
    "textual_inversion, as shipped": Case("textual_inversion", "fp32"),
    "lora, as shipped": Case("lora", "fp32"),
    "hollowed_net, as shipped": Case("hollowed_net", "fp32"),
    "dreambooth, as shipped": Case("dreambooth", "fp32"),
}
"""Recipes of fp32 in their own precision, for which tiny has the room."""
ON_GPU: dict[str, Case] = {
    "zoodip, launched one by one": Case("zoodip", cuda_graph=False),
    "dreambooth": Case("dreambooth", "fp32"),
}
"""What a GPU alone tells apart, or has the room for."""
BESIDE = "zoodip"
"""What the others' training steps stand beside, and whose base draws alone, without an adapter in its layers."""
ALONE = "int8 the base alone"
MERGED = "lora, checkpointing"
"""Whose LoRA is merged for drawing, once its training is timed."""
DRAWN = ("lora", MERGED, "hollowed_net")
"""What draws otherwise than the base alone, which `BESIDE` has."""

Sides = dict[str, Callable[[], object]]


def run(name: str, rounds: int = 5, device: str = "cpu") -> Iterator[Row]:
    """Seconds of every method's training and denoising steps, each in turn with those of `BESIDE` in one process."""
    cases = {case: about for case, about in CASES.items() if about.precision in available_precisions()}
    cases |= AS_SHIPPED if name == "tiny" else {}
    cases |= ON_GPU if torch.device(device).type == "cuda" else {}
    with _loaded(name, cases.pop(BESIDE), device) as module:
        beside, alone = _training(f"int8 {BESIDE}", module), {ALONE: _drawing(module)}
        yield from _timed(name, "seconds a training step", beside, beside, rounds)
        yield from _timed(name, "seconds a denoising step", alone, alone, rounds)
        for case, about in cases.items():
            with _loaded(name, about, device) as module:
                training = _training(f"{about.precision} {case}", module)
                yield from _timed(name, "seconds a training step", training, beside, rounds)
                if case in DRAWN:
                    yield from _timed(name, "seconds a denoising step", _drawn(case, module), alone, rounds)


@contextmanager
def _loaded(name: str, about: Case, device: str) -> Iterator[PersonalizationModule]:
    """A recipe on its base, which goes with it."""
    module = recipe(about.recipe)(about.precision, about.checkpointing)
    module.cuda_graph = about.cuda_graph
    base = made_up.load(made_up.found(name, about.precision, device), module, device)
    module.take(base)
    if module.graphed is not None:
        module.graphed.insists = True  # what cannot be captured has no figure
    try:
        yield module
    finally:
        base.close()
        gc.collect()  # what a module holds lies in cycles


def _training(case: str, module: PersonalizationModule) -> Sides:
    """A step of each branch: draw, estimate, step; a hollow's activation is made up."""
    base, optimizer = module.loaded(), module.configure_optimizers()
    sides: Sides = {}
    for phase, estimator, resolution in branches(module, base.resolution):
        draw = draw_of(module, estimator, made_up.batch(base, resolution))
        branch = "" if module.selector is None else f", {'low' if phase == 'low step' else 'high'} resolution"
        sides[f"{case}{branch}"] = partial(_step, module, estimator, draw, optimizer)
    return sides


def _step(module: PersonalizationModule, estimator: Estimator, draw: Draw, optimizer: Any) -> None:
    optimizer.zero_grad()
    give_gradient(module, estimator, draw, optimizer)
    optimizer.step()


def _drawn(case: str, module: PersonalizationModule) -> Sides:
    """A method's own ways to draw."""
    if case == MERGED:
        assert isinstance(module.adapter, LoRA)
        module.adapter.merge_()
        return {"int8 LoRA merged": _drawing(module)}
    if module.hollow is None:
        return {"int8 LoRA beside the weights": _drawing(module)}
    whole, hollowed = _drawing(module), _drawing(module, two_paths=False)
    return {"int8 hollowed_net, two paths": whole, "int8 hollowed_net, one path": hollowed}


@torch.no_grad()
def _drawing(module: PersonalizationModule, two_paths: bool = True) -> Callable[[], object]:
    """One guided denoising step of one picture, as a denoising loop calls the U-Net."""
    base = module.loaded()
    side = base.resolution // base.vae_factor
    told = module.condition_on([module.named(PROMPT)] * 2)
    noise = torch.randn(2, base.unet.config.in_channels, side, side).to(base.device, base.dtype)
    times = torch.full((2,), 500, device=base.device)

    @torch.no_grad()
    def step() -> None:
        with module.drawing() if two_paths else nullcontext():
            base.unet(noise, times, encoder_hidden_states=told.embeds, added_cond_kwargs=told.added(noise))

    return step


def _timed(base: str, metric: str, sides: Sides, beside: Sides, rounds: int) -> Iterator[Row]:
    """Seconds of each side, and how fast it is beside the one of `beside`."""
    (first,) = beside
    seconds = interleaved(beside | sides, rounds, warmup=1)
    for case in sides:
        own, ratio = statistics.median(seconds[case]), median_ratio(seconds[first], seconds[case])
        yield row("methods", f"{base} {case}", metric, own, "s", statistics.median(seconds[first]), ratio)
        print(f"{case}: {own:.3g} s, {ratio:.2f}x as fast as {first}", flush=True)
