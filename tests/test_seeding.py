"""Every seed has numbers of its own, and small ones those that torch gives them."""

import torch

from mep_lightning.draws import step_generator
from mep_lightning.seeding import seeded


def drawn(generator):
    return torch.randn(4, generator=generator)


def test_seeds_above_what_torch_tells_apart_have_numbers_of_their_own():
    seeds = [0, 7, 2**32, 2**32 + 7, 2**33, 2**33 + 7, 2**62]
    assert len({tuple(drawn(seeded(seed)).tolist()) for seed in seeds}) == len(seeds)
    assert torch.equal(drawn(seeded(7)), drawn(torch.Generator().manual_seed(7)))
    assert torch.equal(drawn(seeded(2**40)), drawn(seeded(2**40)))


def test_steps_of_such_seeds_as_well():
    draws = [drawn(step_generator(seed, step)) for seed in (0, 2**32, 2**33) for step in range(3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 9
    plain = (3 * 0x9E3779B1 + 5 * 0x85EBCA77 + 0x27D4EB2F) % 2**63
    assert torch.equal(drawn(step_generator(3, 5)), drawn(torch.Generator().manual_seed(plain)))
