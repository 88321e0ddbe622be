"""`memory`: the plan of every method on a base, and what runs at its real size take beside it, with made-up weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.performance import made_up
from benchmarks.rows import Row, row
from mep_lightning.bases import BaseFolder
from mep_lightning.bases.skeleton import skeleton_vae
from mep_lightning.bases.streaming import streamed_bytes
from mep_lightning.bases.weights import Half
from mep_lightning.commands.budget import available_precisions, recipe
from mep_lightning.defaults import METHODS
from mep_lightning.estimators import ForwardGradientEstimator
from mep_lightning.module import PersonalizationModule
from mep_lightning.plan import Row as Planned
from mep_lightning.plan import plan
from mep_lightning.plan.rehearsal import branches, denoise, draw_of, gradient, state
from mep_lightning.plan.rows import Recipe

MEASURED = (
    "zoodip in int8",
    "zoodip, tangents in int8",
    "zoodip in int8 (streamed)",
    "zoodip in int4",
    "textual_inversion_lite in int8 (checkpointing)",
    "lora in int8",
    "lora in int8 (checkpointing)",
    "hollowed_net in int8",
    "selective in int8",
    "zoodip_fast in int8",
    "gf_ti in int8",
    "peqa in int8",
    "tuneqdm in int8",
    "qlora in int4",
    "textual_inversion in fp32",
    "dreambooth in fp32",
)
"""Which rows of the plan are run as well; on a CPU, where nothing waits outside, those that are not streamed."""


LARGE = {"dreambooth in fp32"}
"""Of them, those that a GPU alone has the room for."""


def run(
    base: str,
    device: str = "cpu",
    resolution: int | None = None,
    measured: bool = True,
    methods: Sequence[str] = METHODS,
) -> Iterator[Row]:
    """The plan for a GPU; where it is `measured`, for this device plan and measurement of the rows in `MEASURED`."""
    recipes = {name: recipe(name) for name in methods}
    if "zoodip" in recipes:
        recipes["zoodip, tangents"] = _carried(recipes["zoodip"])
    for planned in plan(recipes, base, resolution=resolution, precisions=available_precisions()):
        case = f"{base} {planned.resolution} px {planned}"
        yield row("memory", case, "planned peak on a GPU", planned.peak_bytes, "B")
        yield row("memory", case, "planned peak of drawing on a GPU", planned.inference_peak_bytes, "B")
    if not measured:
        return
    for planned in _to_measure(recipes, base, device, resolution):
        module = recipes[planned.method](planned.precision, planned.checkpointing)
        for phase, peak in measure(module, planned, device).items():
            case = f"{base} {planned.resolution} px {planned} {phase}"
            expected = planned.phases[phase].total
            yield row("memory", case, f"peak on {device}, the plan as baseline", peak, "B", expected)
            print(f"{case}: {peak / 2**20:.0f} MiB, planned {expected / 2**20:.0f}", flush=True)


def _to_measure(recipes: dict[str, Recipe], base: str, device: str, resolution: int | None) -> Iterator[Planned]:
    for precision in available_precisions():
        of_it = {name for name in recipes if any(one.startswith(f"{name} in {precision}") for one in MEASURED)}
        chosen = {name: make for name, make in recipes.items() if name in of_it}
        if chosen:
            rows = plan(chosen, base, resolution=resolution, device=device, precisions=[precision], pictures=1)
            wanted = MEASURED if torch.device(device).type == "cuda" else set(MEASURED) - LARGE
            yield from (planned for planned in rows if str(planned) in wanted)


def _carried(make: Recipe) -> Recipe:
    """A recipe whose zeroth-order gradients are carried as tangents."""

    def carry(precision: str, checkpointing: bool | None) -> PersonalizationModule:
        module = make(precision, checkpointing)
        module.estimator = ForwardGradientEstimator(n=2, normalize=True, seed=module.seed)
        return module

    return carry


def measure(module: PersonalizationModule, planned: Planned, device: str) -> dict[str, int]:
    """Bytes at the peak of every phase of a run that does one of everything."""
    gc.collect()  # what an earlier recipe held lies in cycles
    if torch.device(device).type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # of a backward pass' thread, which an earlier recipe had
    found = made_up.found(planned.base, planned.precision, device, planned.offload)
    reads_text, base = module.adapter.trains_text, []  # type: tuple[bool, list[Base]]
    peaks = {
        "encode": _autoencoder(found, planned.resolution, "encoder"),
        "decode": _autoencoder(found, found.resolution, "decoder"),
    }
    loading = peak_of(lambda: base.append(made_up.load(found, module)), found)
    on_cpu = found.device.type == "cpu"
    held = _held(base[0].unet, *base[0].text_encoders) if on_cpu else 0
    if reads_text:
        peaks["load"] = max(loading, held)
    arenas = sum(map(streamed_bytes, (base[0].unet, *base[0].text_encoders))) if base[0].streams else 0
    module.take(base[0])
    kept = state(module)
    moments, trained = sum(moment.numel() * moment.element_size() for moment in kept), _held(module.adapter)
    held += moments + trained if on_cpu else 0
    # Pictures are decoded beside what is not parked: on a CPU all of it, of streamed weights the arenas.
    peaks["decode"] += held if on_cpu else moments + (arenas + trained if arenas else 0)
    peaks["denoise"] = held + peak_of(lambda: denoise(module, found.resolution // found.vae_factor, 1), found)
    if module.hollow is not None:
        inside = module.hollow.inside(base[0])
        held -= _held(*inside) if on_cpu else 0
    for name, estimator, resolution in branches(module, planned.resolution):
        draw = draw_of(module, estimator, made_up.batch(base[0], resolution))
        if module.hollow is not None and not base[0].freed:
            base[0].free(inside)
        peaks[name] = held + peak_of(lambda e=estimator, d=draw: gradient(module, e, d), found)
        module.adapter.zero_grad()
    base[0].close()
    return {name: peaks[name] for name in planned.phases if name in peaks}


def peak_of(run: Callable[[], object], found: BaseFolder) -> int:
    """The most bytes that are allocated while something runs: all there are on a GPU, those that come in on a CPU."""
    if found.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(found.device)
        run()
        return torch.cuda.max_memory_allocated(found.device)
    return allocated_peak(run)


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator had out at once while something ran, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@torch.no_grad()
def _autoencoder(found: BaseFolder, resolution: int, half: Half) -> int:
    """The peak of encoding a photo or decoding a picture with that half."""
    vae = skeleton_vae(replace(found, device=found.weights_device), made_up.random_weights_on("cpu"), half)
    stream = found.placed(vae)
    held = _held(vae) if found.device.type == "cpu" else 0
    side = resolution // found.vae_factor
    seen = (3, resolution, resolution) if half == "encoder" else (vae.config.latent_channels, side, side)
    picture = torch.rand(1, *seen, dtype=vae.dtype, device=found.device)
    run = vae.encode if half == "encoder" else vae.decode
    peak = held + peak_of(lambda: run(picture), found)
    if stream is not None:
        stream.close()
    return peak


def _held(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))
