"""`step` at a base's real size: our step beside the ordinary one, with made-up weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.performance.kernels import matmul_ceiling
from benchmarks.performance.made_up import random_weights_on
from benchmarks.performance.ordinary import OrdinaryStep
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base
from mep_lightning.bases.load import activation_dtype
from mep_lightning.bases.skeleton import skeleton
from mep_lightning.estimators import (
    ForwardGradientEstimator,
    FusedZOAdam,
    RandomGradientEstimator,
    SubspaceGradient,
    ZerothOrderEstimator,
)
from mep_lightning.plan.rehearsal import WORD

ORDINARY = {"cpu": ("fp32", "bf16"), "cuda": ("int8",)}
"""Precisions of the ordinary step by device: what one would run there today."""
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"fp32 activations": {}, "bf16 activations": {"activations": "bf16"}},
    "cuda": {"fp16 activations": {"cuda_graph": False}, "fp16 activations, graph": {"cuda_graph": True}},
}
"""Ours by device: the plainest, and what is faster."""
CARRIED = "tangents, "
"""What the name of a way begins with whose derivatives are carried; the rest is the finite difference's beside it."""
INTEGERS = {"int8 activations": {"activations": "int8", "cuda_graph": False}}
"""Ways of tangents alone."""


def run(name: str, rounds: int = 5, device: str = "cpu", compiled: bool = False) -> list[Row]:
    """Seconds a step of ours, in int8, and of the ordinary ones; all in turn in one process."""
    kind = torch.device(device).type
    ways = WAYS[kind]
    if compiled:
        ways = ways | {f"{way}, compiled": {**switches, "compile": True} for way, switches in ways.items()}
    ways = ways | {f"{CARRIED}{way}": switches for way, switches in (WAYS[kind] | INTEGERS).items()}
    sides: dict[str, Callable[[], object]] = {
        way: ours(name, device, carried=way.startswith(CARRIED), **switches) for way, switches in ways.items()
    }
    for precision in ORDINARY[kind]:
        base = skeleton(name, precision, device, random_weights_on(device))
        assert base.vae is not None
        photo = torch.rand(1, 3, base.resolution, base.resolution, dtype=base.vae.dtype, device=device) * 2 - 1
        sides[precision] = OrdinaryStep(base, photo, compiled=compiled)
    seconds = interleaved(sides, rounds, warmup=1)
    rows = []
    work = flops(name)
    for way, switches in ways.items():
        dtype = activation_dtype("int8", torch.device(device), "", switches.get("activations", "auto"))
        ceiling = matmul_ceiling(dtype, device)
        case = f"{name} int8 n=2, {way}"
        share = work / statistics.median(seconds[way]) / ceiling
        if not way.startswith(CARRIED):  # whose products are others
            rows.append(row("step", case, "share of the ceiling", share, ""))
            print(f"{case}: {share:.0%} of {ceiling / 1e12:.2f} TFLOP/s", flush=True)
    beside = [
        (way, precision, f"ordinary {precision}{', compiled' if compiled else ''}")
        for way, precision in product(ways, ORDINARY[kind])
    ]
    default, *_ = WAYS[kind]
    for way in filter(lambda way: way.startswith(CARRIED), ways):
        finite = way.removeprefix(CARRIED)
        beside += [(way, other, f"differences, {other}") for other in dict.fromkeys((finite, default)) if other in ways]
    for way, other, said in beside:
        case = f"{name} int8 n=2, {way}, beside {said}"
        value, baseline = statistics.median(seconds[way]), statistics.median(seconds[other])
        ratio = median_ratio(seconds[other], seconds[way])
        rows.append(row("step", case, "seconds a step", value, "s", baseline, ratio))
        print(f"{case}: {ratio:.2f}x ({value:.2f} s, {baseline:.2f} s)", flush=True)
    return rows


def flops(name: str) -> float:
    """Floating-point operations of the products in a step of three members, what they share counted once."""
    counting = FlopCounterMode(display=False)
    # A CPU's fused attention is not counted; its definition is.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counting:
        weigh(*_parts(name, skeleton(name, "fp32", vae=False)), 0)
    return float(counting.get_total_flops())


def ours(name: str, device: str, carried: bool = False, **switches: Any) -> Callable[[], object]:
    """Our step: draw, weigh by finite differences or carried tangents, and update in one.

    Switches are `PersonalizationModule`'s.
    """
    dtype = activation_dtype("int8", torch.device(device), "", switches.get("activations", "auto"))
    base = skeleton(name, "int8", device, random_weights_on(device), dtype=dtype, vae=False)
    module, batch = _parts(name, base, carried, **switches)
    optimizer = FusedZOAdam(module.adapter.parameters(), lr=5e-3, eps=1e-3)
    theta, subspace = module.adapter.theta, module.subspace
    assert subspace is not None
    steps = iter(range(10**9))

    def step() -> None:
        now = next(steps)
        weights = weigh(module, batch, now)
        optimizer.receive(theta, weights, seed=0, step=now, param_id=0, basis=subspace.basis_on(theta.device))
        optimizer.step()
        subspace.observe(theta.detach())

    return step


def weigh(module: PersonalizationModule, batch: dict[str, Any], now: int) -> Tensor:
    """What the members' losses say about the directions of a step."""
    draw, estimator, subspace = module.draw(batch), module.estimator, module.subspace
    assert isinstance(estimator, ZerothOrderEstimator) and subspace is not None
    dims = subspace.dims_left or module.adapter.theta.numel()
    return estimator.weigh(lambda members: module.losses(members, draw), dims, now)[0]


def _parts(
    name: str, base: Base, carried: bool = False, **switches: Any
) -> tuple[PersonalizationModule, dict[str, Any]]:
    finite = RandomGradientEstimator(2, 1e-3, normalize=True)
    module = PersonalizationModule(
        name,
        "int8",
        adapter=TokenEmbedding(init=WORD),
        estimator=ForwardGradientEstimator(2, normalize=True) if carried else finite,
        subspace=SubspaceGradient(),
        **switches,
    )
    module.class_word = WORD
    module.take(base)
    side = base.resolution // base.vae_factor
    latents = torch.randn(1, base.unet.config.in_channels, side, side)
    return module, {"mean": latents, "std": torch.ones_like(latents), "prompts": ["a photo of a {}"]}
