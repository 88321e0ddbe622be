"""`autoencoder`: encoding a photo and decoding a picture in bands of rows, beside the same layers whole and diffusers'.

SD1.5's at 512 px in fp32, with made-up weights, on a CPU: seconds, all in turn, and the most that activations take.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import made_up
from benchmarks.memory import allocated_peak
from benchmarks.ordinary import as_it_comes_
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning.bases import bands
from mep_lightning.bases.skeleton import skeleton_vae
from mep_lightning.bases.weights import Half

SIDE = 512
CASES: dict[str, Half] = {"encoding a photo": "encoder", "decoding a picture": "decoder"}
CLOSE = 1e-3
"""Of the answer's largest number; what comes out of made-up weights is small beside what goes through them."""


@torch.no_grad()
def run(rounds: int = 3, side: int = SIDE) -> Iterator[Row]:
    """For each half a row of seconds and one of bytes beside either.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    for case, half in CASES.items():
        ours, theirs = (_half(half, side, as_it_comes) for as_it_comes in (False, True))
        sides = {"in bands": ours, "the same whole": _whole(ours), "diffusers'": theirs}
        answers = {name: answer() for name, answer in sides.items()}
        for name, other in answers.items():
            apart = (answers["in bands"] - other).abs().max()
            assert apart <= CLOSE * other.abs().max(), f"{case}: other numbers than {name}"
        seconds = interleaved(dict(sides), rounds, warmup=0)
        peaks = {name: allocated_peak(answer) for name, answer in sides.items()}
        fast, least = seconds.pop("in bands"), peaks["in bands"]
        for name, slow in seconds.items():
            ratio, most = median_ratio(slow, fast), peaks[name]
            about = f"{case}, beside {name}"
            yield row("autoencoder", about, "seconds", statistics.median(fast), "s", statistics.median(slow), ratio)
            yield row("autoencoder", about, "peak of activations", least, "B", most, most / least)
            print(f"{about}: {ratio:.2f}x", flush=True)


def _half(half: Half, side: int, as_it_comes: bool) -> Callable[[], Tensor]:
    """What runs one half on the same picture, with the same weights."""
    found = made_up.found("sd15", "int8", "cpu")
    vae: Any = skeleton_vae(found, made_up.random_weights_on("cpu"), half)
    if as_it_comes:
        as_it_comes_(vae)
    generator = torch.Generator().manual_seed(0)
    if half == "encoder":
        photo = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
        return lambda: vae.encode(photo).latent_dist.mean
    latents = torch.randn(1, vae.config.latent_channels, *[side // found.vae_factor] * 2, generator=generator)
    return lambda: vae.decode(latents).sample


def _whole(answer: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with bands so large that there is one."""

    def run() -> Tensor:
        before, bands.BAND = bands.BAND, sys.maxsize
        try:
            return answer()
        finally:
            bands.BAND = before

    return run
