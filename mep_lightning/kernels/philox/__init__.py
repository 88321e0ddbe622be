"""Normals as a pure function of (seed, step, member, parameter id, element), so that noise never has to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import defined_by, runs_triton
from mep_lightning.kernels.philox import reference
from mep_lightning.kernels.philox.reference import WORD, Member, philox_uint32

__all__ = ["philox_normal", "philox_normals", "philox_uint32"]

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


def philox_normals(
    seed: int, step: int, members: Sequence[int], sizes: Mapping[int, int], device: torch.device | None = None
) -> dict[int, Tensor]:
    """`philox_normal` for many parameters. A CPU draws them in few sweeps, as a call costs it more than the numbers.

    Args:
        seed, step, members, device: as for `philox_normal`.
        sizes: parameter id -> how many.

    Returns:
        parameter id -> fp32 [M, numel].
    """
    apart = runs_triton(torch.empty(0, device=device))
    normals: dict[int, Tensor] = {}
    small: dict[int, int] = {}
    for param_id, numel in sizes.items():
        if apart or -(-numel // 4) * len(members) > CPU_BLOCKS // 2:
            normals[param_id] = philox_normal(seed, step, members, param_id, numel, device)
        else:
            small[param_id] = numel
    while small:
        together: dict[int, int] = {}
        blocks = 0
        while small and blocks * len(members) <= CPU_BLOCKS:
            param_id, numel = small.popitem()
            together[param_id], blocks = numel, blocks + -(-numel // 4)
        normals |= _in_one_sweep(seed, step, members, together, device)
    return normals


def _in_one_sweep(
    seed: int, step: int, members: Sequence[int], sizes: Mapping[int, int], device: torch.device | None
) -> dict[int, Tensor]:
    counts = [-(-numel // 4) for numel in sizes.values()]
    blocks = torch.cat([torch.arange(count, device=device) for count in counts])
    ids = torch.tensor(list(sizes), device=device)
    ids = ids.repeat_interleave(torch.tensor(counts, device=device), output_size=len(blocks))
    drawn = reference.normal_blocks(blocks, seed & ((1 << 64) - 1), step, list(members), ids).flatten(-2)  # [M, 4 N]
    parts = drawn.split([4 * count for count in counts], dim=-1)
    return {param_id: part[:, :numel] for (param_id, numel), part in zip(sizes.items(), parts, strict=True)}
