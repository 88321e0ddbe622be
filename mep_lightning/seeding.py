"""Generators whose numbers are a pure function of their seed, whatever its size."""

from __future__ import annotations

import hashlib

from torch import Generator

TOLD_APART = 2**32
"""How many seeds torch's generator on a CPU tells apart: it takes their lower half alone."""


def seeded(seed: int, rest: int | None = None) -> Generator:
    """A generator of its own for every seed: where torch's has no more than `TOLD_APART`.

    Args:
        seed: from 0 on.
        rest: what else tells it from others; None is the seed's upper half.
    """
    rest = seed // TOLD_APART if rest is None else rest
    if rest:
        digest = hashlib.blake2b(f"{rest} {seed}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest)
    return Generator().manual_seed(seed)
