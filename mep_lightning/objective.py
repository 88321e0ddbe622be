"""The denoising objective: the squared error of what each member's U-Net predicts, in one forward or a few."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep_lightning.bases import Conditioning, condition_on, condition_on_ids, prompt_ids, remember
from mep_lightning.bases.load import INTEGERS
from mep_lightning.draws import Draw
from mep_lightning.estimators.perturbation import Members
from mep_lightning.quantization import integer_products
from mep_lightning.tangents import Dual

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule

CARRIED = 4
"""Dimensions of a token's value with its tangents, [1 + n, 1, vectors, D]; members alone have one less."""


def losses(module: PersonalizationModule, members: Members | Tensor, draw: Draw) -> Tensor:
    """`PersonalizationModule.losses`: fp32 [V]."""
    count = len(members)
    if module.members_at_once is None or count <= module.members_at_once or torch.is_grad_enabled():
        return _together(module, members, draw)
    parts = (_chosen(members, places) for places in portions(count, module.members_at_once))
    return torch.cat([_together(module, part, draw) for part in parts])[:count]


def portions(count: int, at_once: int) -> list[list[int]]:
    """Which of a step's members go through the U-Net together, at most so many.

    All portions are of one size, the last filled up with the last member again: in batches of another size kernels
    round otherwise, which a finite difference would divide by mu.
    """
    size = math.ceil(count / math.ceil(count / at_once))
    return [[min(first + i, count - 1) for i in range(size)] for first in range(0, count, size)]


def _chosen(members: Members | Tensor, places: list[int]) -> Members | Tensor:
    return members.chosen(places) if isinstance(members, Members) else members[places]


def _together(module: PersonalizationModule, members: Members | Tensor, draw: Draw) -> Tensor:
    base, adapter = module.loaded(), module.adapter
    if not adapter.trains_text:
        assert isinstance(members, Members)
        remember(base, draw.prompts)
        told = condition_on(base, draw.prompts)
        with adapter.at(members):
            return _means(_errors(module, told, len(members), draw), draw, module.prior_weight)
    ids = prompt_ids(base, draw.prompts, adapter.tokens())
    if module.graphed is not None and not (torch.is_grad_enabled() or draw.priors):
        (values,) = adapter.tokens(members).values()
        rest = ids, draw.noisy, draw.timestep, draw.target
        return Dual(module.graphed(values.stack, *rest)) if isinstance(values, Dual) else module.graphed(values, *rest)
    told = condition_on_ids(base, ids, adapter.tokens(members))
    with adapter.at(members if isinstance(members, Members) else Members()):
        return _means(_errors(module, told, len(members), draw), draw, module.prior_weight)


def of_token(
    module: PersonalizationModule, values: Tensor, ids: Tensor, noisy: Tensor, timestep: Tensor, target: Tensor
) -> Tensor:
    """`losses` of a token as a function of tensors, ids [encoders, B, T]; stacks in and out for tangents."""
    carried = values.dim() == CARRIED
    members = Dual(values) if carried else values
    told = condition_on_ids(module.loaded(), ids, module.adapter.tokens(members))  # of V * B prompts
    draw = Draw(noisy, timestep, target, [])
    found = _means(_errors(module, told, len(members), draw), draw, module.prior_weight)
    return found.stack if isinstance(found, Dual) else found


def of_tokens(
    module: PersonalizationModule, values: Tensor, ids: Tensor, noisy: Tensor, timestep: Tensor, target: Tensor
) -> Tensor:
    """Losses of S subjects at once, each with a token of its own and photos of its own; stacks in and out for tangents.

    Args:
        module: one of theirs, with the base that they share.
        values: of the tokens, [V, S, vectors, D], or with tangents [1 + n, 1, S, vectors, D].
        ids: of S * B prompts, subject-major, in which subject s goes by `subject_name(s)`; [encoders, S * B, T].
        noisy, timestep, target: of S * B samples.

    Returns:
        [V, S], or with tangents [1 + n, 1, S].
    """
    carried = values.dim() == CARRIED + 1
    members: Tensor = Dual(values) if carried else values
    subjects = members.shape[1]
    tokens = {subject_name(s): members[:, s] for s in range(subjects)}
    told = condition_on_ids(module.loaded(), ids, tokens)
    errors = _errors(module, told, len(members), Draw(noisy, timestep, target, []))
    found = errors.unflatten(1, (subjects, -1)).flatten(2).mean(2)
    return found.stack if isinstance(found, Dual) else found


def subject_name(number: int) -> str:
    """What a subject's token is called in the prompts of several."""
    return f"<subject-{number}>"


def _means(errors: Tensor, draw: Draw, prior_weight: float) -> Tensor:
    """Losses [V] of squared errors [V, B, C, H, W]."""
    own = errors[:, : len(draw.noisy) - draw.priors].flatten(1).mean(1)
    if not draw.priors:
        return own
    return own + prior_weight * errors[:, -draw.priors :].flatten(1).mean(1)


def _errors(module: PersonalizationModule, told: Conditioning, members: int, draw: Draw) -> Tensor:
    """What each member's prediction errs by, squared, fp32 [V, B, C, H, W]."""
    hollow = module.hollow if draw.activation is not None else None
    with integer_products() if module.activations == INTEGERS else nullcontext():
        predicted = module.predict_noise(
            module.loaded().unet,
            draw.noisy,
            draw.timestep,
            told,
            members=members,
            apart=module.adapter.layers,
            checkpointing=module.checkpointing,
            cut=hollow.cut if hollow else None,
            activation=draw.activation,
        )
    return (predicted.float().unflatten(0, (members, -1)) - draw.target).pow(2)
