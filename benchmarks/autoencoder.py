"""`autoencoder`: encoding a photo and decoding a picture in bands of rows, beside diffusers' layers as they come.

SD1.5's at 512 px in fp32, with made-up weights, on a CPU: seconds, both in turn, and the most that activations take.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import made_up
from benchmarks.memory import allocated_peak
from benchmarks.ordinary import as_it_comes_
from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning.bases.skeleton import skeleton_vae
from mep_lightning.bases.weights import Half

SIDE = 512
CASES: dict[str, Half] = {"encoding a photo": "encoder", "decoding a picture": "decoder"}
CLOSE = 1e-3
"""Of the answer's largest number; what comes out of made-up weights is small beside what goes through them."""


@torch.no_grad()
def run(rounds: int = 3, side: int = SIDE) -> Iterator[Row]:
    """A row of seconds and one of bytes for each half.

    Raises:
        AssertionError: the two differ by more than rounding.
    """
    for case, half in CASES.items():
        sides = {name: _half(half, side, as_it_comes) for name, as_it_comes in (("bands", False), ("whole", True))}
        ours, theirs = (run() for run in sides.values())
        assert (ours - theirs).abs().max() <= CLOSE * theirs.abs().max(), f"{case}: other numbers than diffusers'"
        seconds = interleaved(dict(sides), rounds, warmup=0)
        fast, slow = seconds["bands"], seconds["whole"]
        ratio = median_ratio(slow, fast)
        yield row("autoencoder", case, "seconds", statistics.median(fast), "s", statistics.median(slow), ratio)
        print(f"{case}: {ratio:.2f}x", flush=True)
        peaks = {name: allocated_peak(run) for name, run in sides.items()}
        ratio = peaks["whole"] / peaks["bands"]
        yield row("autoencoder", case, "peak of activations", peaks["bands"], "B", peaks["whole"], ratio)


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
