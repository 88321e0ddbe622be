"""`autoencoder`: encoding a photo and decoding a picture in bands of rows, beside the same layers whole and diffusers'.

SD1.5's at 512 px with made-up weights, in fp32 on a CPU and fp16 on a GPU: seconds, all in turn, and the most that
activations take (on a GPU with the workspaces of convolutions).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.performance import made_up
from benchmarks.performance.memory import peak_of
from benchmarks.performance.ordinary import as_it_comes_
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning.bases import BaseFolder, bands
from mep_lightning.bases.skeleton import skeleton_vae
from mep_lightning.bases.weights import Half

SIDE = 512
CASES: dict[str, Half] = {"encoding a photo": "encoder", "decoding a picture": "decoder"}
CLOSE = {torch.float32: 1e-3, torch.float16: 1e-2}
"""Of the answer's largest number; what comes out of made-up weights is small beside what goes through them."""


@torch.no_grad()
def run(rounds: int | None = None, side: int = SIDE, device: str = "cpu") -> Iterator[Row]:
    """For each half a row of seconds and one of bytes beside either.

    Args:
        rounds: of all sides in turn; by default three on a CPU, where each takes half a minute, and fifteen on a GPU.
        side: of a picture, in pixels.
        device: "cpu" or "cuda".

    Raises:
        AssertionError: they differ by more than rounding.
    """
    found = made_up.found("sd15", "int8", device)
    rounds = rounds or (3 if found.device.type == "cpu" else 15)
    for case, half in CASES.items():
        ours, theirs = (_half(found, half, side, as_it_comes) for as_it_comes in (False, True))
        sides = {"in bands": ours, "the same whole": _whole(ours), "diffusers'": theirs}
        answers = {name: answer() for name, answer in sides.items()}
        for name, other in answers.items():
            apart = (answers["in bands"] - other).abs().max()
            assert apart <= CLOSE[found.dtype] * other.abs().max(), f"{case}: other numbers than {name}"
        answers.clear()
        seconds = interleaved(dict(sides), rounds, warmup=0)
        peaks = {name: _activations(answer, found) for name, answer in sides.items()}
        fast, least = seconds.pop("in bands"), peaks["in bands"]
        for name, slow in seconds.items():
            ratio, most = median_ratio(slow, fast), peaks[name]
            about = f"{case}, beside {name}"
            yield row("autoencoder", about, "seconds", statistics.median(fast), "s", statistics.median(slow), ratio)
            yield row("autoencoder", about, "peak of activations", least, "B", most, most / least)
            print(f"{about}: {ratio:.2f}x", flush=True)


def _half(found: BaseFolder, half: Half, side: int, as_it_comes: bool) -> Callable[[], Tensor]:
    """What runs one half on the same picture, with the same weights."""
    vae: Any = skeleton_vae(found, made_up.random_weights_on("cpu"), half)
    if as_it_comes:
        as_it_comes_(vae)
    generator = torch.Generator().manual_seed(0)
    if half == "encoder":
        photo = (torch.rand(1, 3, side, side, generator=generator) * 2 - 1).to(found.device, found.dtype)
        return lambda: vae.encode(photo).latent_dist.mean
    noise = torch.randn(1, vae.config.latent_channels, *[side // found.vae_factor] * 2, generator=generator)
    latents = noise.to(found.device, found.dtype)
    return lambda: vae.decode(latents).sample


def _activations(answer: Callable[[], Tensor], found: BaseFolder) -> int:
    """The most bytes that are there while a half runs, beyond what was before."""
    before = torch.cuda.memory_allocated(found.device) if found.device.type == "cuda" else 0
    return peak_of(answer, found) - before


def _whole(answer: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with bands so large that there is one."""

    def run() -> Tensor:
        before, bands.BAND = bands.BAND, sys.maxsize
        try:
            return answer()
        finally:
            bands.BAND = before

    return run
