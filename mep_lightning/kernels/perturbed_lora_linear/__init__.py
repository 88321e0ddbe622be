"""A LoRA linear for V members that differ in its factors alone: one int8 product for all, a low-rank term for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep_lightning.kernels.dispatch import (
    asks_gradient,
    autocast_activation,
    defined_by,
    needs_reference,
    runs_triton,
)
from mep_lightning.kernels.int8_linear import int8_linear
from mep_lightning.kernels.perturbed_lora_linear import reference
from mep_lightning.kernels.perturbed_lora_linear.reference import Probe
from mep_lightning.kernels.philox import philox_normal

__all__ = ["perturbed_lora_linear"]


@torch.library.custom_op("mep_lightning::perturbed_lora_linear", mutates_args=())
def _perturbed_lora_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    directions: Sequence[int],
    signs: Sequence[float],
    mu: float,
    seed: int,
    step: int,
    param_a: int,
    param_b: int,
) -> Tensor:
    probes = list(zip(directions, signs, strict=True))
    if runs_triton(x):
        from mep_lightning.kernels.perturbed_lora_linear import triton

        if triton.takes(a):
            ids = param_a, param_b
            return triton.perturbed_lora_linear(x, q, scale, bias, a, b, scaling, probes, mu, seed, step, ids)
    members = x.reshape(len(probes), -1, x.shape[-1])  # [V, N, I]
    with torch.autocast(x.device.type, enabled=False):  # it would round mu away
        low = members.float() @ _moved(a, probes, mu, seed, step, param_a).mT  # [V, N, r]
        term = low @ _moved(b, probes, mu, seed, step, param_b).mT  # [V, N, O]
        y = int8_linear(x, q, scale, bias)
    return term.view(y.shape).mul_(scaling).add_(y).to(x.dtype)


def _moved(factor: Tensor, probes: list[Probe], mu: float, seed: int, step: int, param_id: int) -> Tensor:
    """The factor of every member, fp32 [V, *factor.shape]; a direction that several members share is drawn once."""
    drawn = sorted({i for i, sign in probes if sign})
    members = factor.float().expand(len(probes), *factor.shape).clone()
    if drawn:
        noises = philox_normal(seed, step, drawn, param_id, factor.numel(), factor.device)
        for member, (i, sign) in zip(members, probes, strict=True):
            if sign:
                member.add_(noises[drawn.index(i)].view(factor.shape), alpha=sign * mu)
    return members


@_perturbed_lora_linear.register_fake
def _(x: Tensor, q: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


@defined_by(reference.perturbed_lora_linear)
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
    """y_v = x_v (q * s)' + bias + scaling * (x_v (A + mu u_A)') (B + mu u_B)' for V members at once.

    The members share one int8 product over their stacked rows. Each adds its own low-rank term, whose directions u are
    made again from their seed; on a GPU in registers.

    Args:
        x: [V * N, ..., I], member-major; fp32, bf16 or fp16.
        q, scale, bias: the frozen weight, as for `int8_linear`.
        a, b: LoRA's factors, [r, I] and [O, r].
        scaling: alpha / r.
        probes: V members, each a direction i and a sign (0: the factors as they are), as an estimator's `probes`.
        mu: the finite step.
        seed, step: of the directions, as in `philox_normal`.
        param_ids: of A and of B.

    Returns:
        [V * N, ..., O] in x's dtype (in autocast's, where autocast is on); the low-rank term is fp32 until the end.

    Raises:
        ValueError: x has no equal share of rows for every member.
        NotImplementedError: a derivative is asked for; this is for forward passes.
    """
    if x.shape[0] % len(probes):
        raise ValueError(f"perturbed_lora_linear: {x.shape[0]} rows cannot be shared among {len(probes)} members")
    if needs_reference() or asks_gradient(x, scale, bias, a, b):
        raise NotImplementedError("perturbed_lora_linear is for forward passes and has no derivative")
    seed &= (1 << 64) - 1
    signed = seed - (1 << 64) if seed >> 63 else seed  # an op's integers are signed
    directions, signs = [i for i, _ in probes], [float(sign) for _, sign in probes]
    x = autocast_activation(x)
    return _perturbed_lora_linear(x, q, scale, bias, a, b, scaling, directions, signs, mu, signed, step, *param_ids)
