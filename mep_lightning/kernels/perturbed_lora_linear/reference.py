"""A LoRA linear for V members that stand at different points of its two factors: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep_lightning.kernels.int8_linear.reference import int8_linear
from mep_lightning.kernels.philox.reference import philox_normal

Probe = tuple[int, float]
"""A member: direction i and its sign; sign 0 is the point itself."""


def moved(factor: Tensor, probe: Probe, mu: float, seed: int, step: int, param_id: int) -> Tensor:
    """factor + sign * mu * e_i in fp32, in the factor's shape."""
    i, sign = probe
    if sign == 0:
        return factor.float()
    noise = philox_normal(seed, step, i, param_id, factor.numel(), factor.device).view(factor.shape)
    return torch.add(factor.float(), noise, alpha=sign * mu)


def perturbed_lora_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    probes: Sequence[Probe],
    mu: float,
    seed: int,
    step: int,
    param_ids: tuple[int, int],
) -> Tensor:
    """y_v = x_v (q * s)' + bias + scaling * (x_v A_v') B_v', the last term in fp32. x [V * N, ..., I] -> [..., O]."""
    outputs = []
    for probe, rows in zip(probes, x.chunk(len(probes)), strict=True):
        a_v = moved(a, probe, mu, seed, step, param_ids[0])  # [r, I]
        b_v = moved(b, probe, mu, seed, step, param_ids[1])  # [O, r]
        with torch.autocast(x.device.type, enabled=False):
            term = rows.float() @ a_v.T @ b_v.T
            outputs.append((int8_linear(rows, q, scale, bias).float() + scaling * term).to(x.dtype))
    return torch.cat(outputs)
