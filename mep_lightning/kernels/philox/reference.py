"""Philox 4x32-10 (Salmon et al., SC11) and Box-Muller in plain PyTorch: the definition of all zeroth-order noise.

The counter is (element // 4, step, member, parameter id) and the key is the 64-bit seed, so a normal is a pure
function of (seed, step, member, parameter id, element). Lane `element % 4` of a block is that element, as in Triton's
`tl.randn4x`. 32-bit words live in int64: a product of two may pass 2^63, but it wraps with every bit right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
UNIFORM_SCALE = 4.6566127342e-10  # the largest that keeps (2^31 - 1) * scale below 1 in fp32
SMALLEST_UNIFORM = 1.0e-7  # Box-Muller takes a logarithm
TWO_PI = 6.283185307179586

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Member = int | Sequence[int]


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int, rounds: int = 10) -> Words:
    """Encrypt the counter (c0, c1, c2, c3) under the key (k0, k1).

    Args:
        c0, c1, c2, c3: int64 tensors that broadcast together, values in [0, 2^32).
        k0, k1: the key's words, in [0, 2^32).

    Returns:
        Four int64 tensors; the low 32 bits of each are the random word, the high ones are arbitrary.
    """
    for _ in range(rounds):
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        # Only c0 and c2 are multiplied next, so only they must be clean 32-bit words.
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ k0) & WORD, b, ((a >> 32) ^ c3 ^ k1) & WORD, a
        k0, k1 = (k0 + WEYL_A) & WORD, (k1 + WEYL_B) & WORD
    return c0, c1, c2, c3


def philox_blocks(blocks: Tensor, seed: int, step: int, member: Member, param_id: int | Tensor) -> Words:
    """The random words of some blocks of four elements.

    Args:
        blocks: int64 [N].
        seed, step: as in `mep_lightning.kernels.philox_normal`.
        member: one number, or M.
        param_id: one of all blocks, or int64 [N], one a block.

    Returns:
        Four int64 [N], or [M, N]; their low 32 bits are valid.
    """
    c1, c3 = (torch.as_tensor(word, device=blocks.device).view(-1) for word in (step, param_id))  # [1] or [N]
    c2 = torch.tensor(member, dtype=torch.int64, device=blocks.device)[..., None]  # [1] or [M, 1]
    return philox_4x32(blocks, c1, c2, c3, seed & WORD, (seed >> 32) & WORD)


def uniform(words: Tensor) -> Tensor:
    """fp32 in [0, 1) from the low 32 bits, as Triton's `uint_to_uniform_float`: fold the sign away, keep 31 bits."""
    signed = words.to(torch.int32)
    return (signed ^ (signed >> 31)).to(torch.float32) * UNIFORM_SCALE


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms, in fp32."""
    radius = (-2.0 * u1.clamp_min(SMALLEST_UNIFORM).log()).sqrt()
    angle = TWO_PI * u2
    return radius * angle.cos(), radius * angle.sin()


def normal_blocks(blocks: Tensor, seed: int, step: int, member: Member, param_id: int | Tensor) -> Tensor:
    """The normals of some blocks. blocks int64 [N] -> fp32 [N, 4], or [M, N, 4] for M members."""
    w0, w1, w2, w3 = philox_blocks(blocks, seed, step, member, param_id)
    return torch.stack((*box_muller(uniform(w0), uniform(w1)), *box_muller(uniform(w2), uniform(w3))), dim=-1)


def philox_uint32(
    seed: int, step: int, member: int, param_id: int, numel: int, device: torch.device | None = None
) -> Tensor:
    """The random integers behind `philox_normal`.

    Returns:
        int64 [numel], values in [0, 2^32).
    """
    blocks = torch.arange(-(-numel // 4), device=device)
    words = torch.stack([word & WORD for word in philox_blocks(blocks, seed, step, member, param_id)], dim=-1)
    return words.view(-1)[:numel]


def philox_normal(
    seed: int, step: int, member: Member, param_id: int, numel: int, device: torch.device | None = None
) -> Tensor:
    """fp32 [numel], or [M, numel]; arguments as in `mep_lightning.kernels.philox_normal`."""
    blocks = torch.arange(-(-numel // 4), device=device)
    return normal_blocks(blocks, seed, step, member, param_id).flatten(-2)[..., :numel]
