"""Normals as a pure function of (seed, step, member, parameter id, element), so that noise never has to be kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.philox import reference
from mep_lightning.kernels.philox.reference import WORD, Member, philox_uint32

__all__ = ["philox_normal", "philox_uint32"]

CPU_BLOCKS = 1 << 16  # half a megabyte each temporary, so they stay in L2: one sweep takes 1.4 to 1.8 times as long
GPU_BLOCKS = 1 << 20


@torch.library.custom_op("mep_lightning::philox_normal", mutates_args=())
def _philox_normal(
    seed: int, step: int, members: Sequence[int], param_id: int, numel: int, device: torch.device | None = None
) -> Tensor:
    normals = torch.empty(len(members), -(-numel // 4), 4, dtype=torch.float32, device=device)
    if runs_triton(normals):
        from mep_lightning.kernels.philox import triton

        triton.philox_normal(seed, step, members, param_id, normals.flatten(1))
        return normals.flatten(1)[:, :numel]
    at_once = CPU_BLOCKS if normals.device.type == "cpu" else GPU_BLOCKS
    chunk = max(1, at_once // max(1, len(members)))
    for start in range(0, normals.shape[1], chunk):
        rows = normals[:, start : start + chunk]
        blocks = torch.arange(start, start + rows.shape[1], device=rows.device)
        rows.copy_(reference.normal_blocks(blocks, seed, step, members, param_id))
    return normals.flatten(1)[:, :numel]


@_philox_normal.register_fake
def _(
    seed: int, step: int, members: Sequence[int], param_id: int, numel: int, device: torch.device | None = None
) -> Tensor:
    padded = torch.empty(len(members), 4 * (-(-numel // 4)), dtype=torch.float32, device=device)
    return padded[:, :numel]


@defined_by(reference.philox_normal)
def philox_normal(
    seed: int, step: int, member: Member, param_id: int, numel: int, device: torch.device | None = None
) -> Tensor:
    """Standard normals from Philox 4x32-10 and Box-Muller; a longer call starts with a shorter one's values.

    Args:
        seed: the key; taken modulo 2^64.
        step, member, param_id: counter words, in [0, 2^32). Several members may be drawn in one call.
        numel: how many, up to 2^34.
        device: where; CPU by default.

    Returns:
        fp32 [numel]; [M, numel] for M members.

    Raises:
        ValueError: a counter word is out of range (it would repeat another's noise).
    """
    members = [member] if isinstance(member, int) else list(member)
    words = [("step", step), ("param_id", param_id), ("numel // 4", numel // 4), *(("member", one) for one in members)]
    for name, word in words:
        if not 0 <= word <= WORD:
            raise ValueError(f"philox_normal: {name} is {word}, but must lie in 0..2^32-1")
    seed &= (1 << 64) - 1
    signed = seed - (1 << 64) if seed >> 63 else seed  # an op's integers are signed
    normals = _philox_normal(signed, step, members, param_id, numel, None if device is None else torch.device(device))
    return normals[0] if isinstance(member, int) else normals
