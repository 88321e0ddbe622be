"""What a module refuses of its settings, and what it warns of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base
from mep_lightning.bases.load import INTEGERS, QUANTIZED
from mep_lightning.bases.tokens import expand
from mep_lightning.distributed import DATA, NAME, Ranks
from mep_lightning.errors import UserError
from mep_lightning.estimators import CMAES, FiniteDifferenceEstimator, ForwardGradientEstimator, ZerothOrderEstimator
from mep_lightning.estimators.perturbation import ROUNDING

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule

ALLOWED_TRAINER_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def refuse_precision(module: LightningModule) -> None:
    """Raise UserError for a Trainer whose precision scales losses."""
    trainer = module._trainer
    if trainer is not None and trainer.precision not in ALLOWED_TRAINER_PRECISIONS:
        raise UserError(
            f"trainer.precision {trainer.precision} cannot train hand-made gradients in fp32: choose "
            f"one of {', '.join(ALLOWED_TRAINER_PRECISIONS)}"
        )


def refuse_streaming_backwards(module: PersonalizationModule, device: torch.device) -> None:
    """Raise UserError where weights would be gone before a backward pass reads them."""
    if module.offload == "stream" and module.hollow is not None and device.type == "cuda":
        raise UserError("model.offload stream saves nothing with HollowedActivations, which frees weights: set it none")
    frugal = module.forward_only or (module.checkpointing and module.precision in QUANTIZED)
    if module.offload == "stream" and device.type == "cuda" and not frugal:
        raise UserError(
            "model.offload stream with a backward pass is for quantised weights and recomputed activations, or nothing "
            "would be saved: set model.checkpointing true and model.precision int8, or use zoodip"
        )


def refuse_one_resolution(module: PersonalizationModule) -> None:
    """Raise UserError where a selector's branches would train at the same resolution."""
    if module.selector is not None and module.photos is None and module._trainer is not None:
        raise UserError("model.selector trains at two resolutions, at both of which SubjectData encodes: fit with one")


def refuse_left_hollow(module: PersonalizationModule) -> None:
    """Raise UserError where steps would go round the draws of an earlier fit, whose photos may have been others."""
    if module._trainer is not None and module.hollow is not None and module.hollow.is_ready:
        raise UserError(
            "the module was trained around a hollow, and its activations are of that fit: fit it with "
            "HollowedActivations again, or a module of its own"
        )


def refuse_cut_subjects(module: PersonalizationModule, prompts: Sequence[str]) -> None:
    """Raise UserError for a prompt so long that what names the subject lies beyond what the base reads."""
    base, token = module.loaded(), module.adapter.token
    counts = {name: len(vectors) for name, vectors in module.adapter.tokens().items()}
    for prompt in prompts:
        found = re.search(rf"(?<!\w){re.escape(token)}(?!\w)", prompt)
        if found is None:
            continue
        for index in range(len(base.tokenizers)):
            tokenizer = base.tokenizer_with(counts, index)
            length = len(tokenizer(expand(prompt[: found.end()], counts), verbose=False).input_ids)
            if length > tokenizer.model_max_length:
                raise UserError(
                    f"the prompt {prompt!r} names {token} beyond the {tokenizer.model_max_length} tokens that the "
                    "base reads: shorten it, or name the subject earlier"
                )


def refuse_displaced(module: PersonalizationModule) -> None:
    """Raise UserError where the base computes with another module's adapter, or without this one's."""
    base, parts = module.loaded(), module.adapter.parts
    is_alone = base.guest is None or any(part is base.guest for part in parts)
    if not (is_alone and all(part.stands_in(base) for part in parts)):
        raise UserError(
            f"another adapter has been taken into the base of this {type(module.adapter).__name__} since: "
            "call module.take(module.base) to draw with this one again"
        )


def refuse_ranks(module: PersonalizationModule, ranks: Ranks) -> None:
    """Raise UserError where several processes cannot train what they are to train, by a Trainer or in a plan."""
    if ranks.world == 1:
        return
    if module._trainer is not None and not isinstance(module.trainer.strategy, DDPStrategy):
        raise UserError(f"trainer.strategy over several processes is ddp or {NAME} here: others take models apart")
    if module.forward_only and not ranks.exchanges_losses:
        raise UserError(
            f"trainer.strategy averages gradients over {ranks.world} processes, and {module.method} has none to "
            f"average: set trainer.strategy {NAME}"
        )
    forward = [one for one in module.estimators if one.forward_only]
    shares = [one.shares if isinstance(one, ZerothOrderEstimator) else one.members for one in forward]
    least = min(shares, default=ranks.world)
    if ranks.shares_members and least < ranks.world:
        raise UserError(
            f"{ranks.world} processes cannot share the {least} members of a step: raise model.estimator.n, or let them "
            f"share data, trainer.strategy {DATA}"
        )


def warn_of_rounding(module: PersonalizationModule, dtype: torch.dtype) -> None:
    """A finite step that drowns in what activations are computed in."""
    least, name = ROUNDING.get(dtype, 0.0), str(dtype).split(".")[1]
    exact = "activations" if module.precision in QUANTIZED else "precision"
    for estimator in module.estimators:
        if not isinstance(estimator, FiniteDifferenceEstimator):
            continue
        if estimator.step_size < least:
            rank_zero_warn(
                f"mu {estimator.step_size:g} drowns in the rounding of {name} activations, as measured on tiny: "
                f"training may be slow or diverge; take mu {least:g}, {exact} fp32, or ForwardGradientEstimator, which "
                "has no mu"
            )
        elif dtype == torch.bfloat16:
            rank_zero_warn(
                f"a finite difference in {name} errs by its half and more at any mu, as measured on tiny; {exact} fp32 "
                "or ForwardGradientEstimator, which has no mu, are true"
            )


def refuse_integers(module: PersonalizationModule) -> None:
    """Raise UserError where integer products would drown or end a derivative."""
    if module.activations == INTEGERS and not all(isinstance(e, ForwardGradientEstimator) for e in module.estimators):
        raise UserError(
            "model.activations int8 drown a finite difference and end a backward pass: take ForwardGradientEstimator, "
            "or activations bf16"
        )


def refuse_search(module: PersonalizationModule) -> None:
    """Raise UserError where a search would meet what is for gradients."""
    if isinstance(module.low_estimator, CMAES) or (isinstance(module.estimator, CMAES) and module.selector is not None):
        raise UserError("CMAES is no branch of several: leave model.selector and model.low_estimator out")
    if not isinstance(module.estimator, CMAES):
        return
    if not isinstance(module.adapter, TokenEmbedding):
        raise UserError(f"CMAES searches for a TokenEmbedding, not for a {type(module.adapter).__name__}: set it")
    if module.subspace is not None:
        raise UserError("model.subspace projects gradients, and CMAES has none: leave it out")


def refuse_compiled_tangents(module: PersonalizationModule) -> None:
    """Raise UserError where `torch.compile` would have to trace tangents."""
    if module.compiled and any(isinstance(one, ForwardGradientEstimator) for one in module.estimators):
        raise UserError(
            "model.compile does not go with ForwardGradientEstimator, whose tangents torch.compile cannot trace: leave "
            "it out, or take RandomGradientEstimator"
        )


def warn_of_idle_switches(module: PersonalizationModule, base: Base) -> None:
    """Switches that change nothing as the others stand."""
    streams = base.offload == "stream"
    if module.cuda_graph is True and not module.takes_graph(base):
        why = "model.offload is stream" if streams else "it is for a GPU, a token and methods without a backward pass"
        rank_zero_warn(f"model.cuda_graph does nothing here: {why}")
    if module.compiled and streams:
        rank_zero_warn("model.compile does nothing here: model.offload is stream")
    if module.checkpointing and module.forward_only:
        rank_zero_warn("model.checkpointing does nothing here: there is no backward pass to keep activations for")
    most = max(one.members for one in module.estimators)
    if module.members_at_once and most <= module.members_at_once:
        counted = "one member" if most == 1 else f"{most} members"
        rank_zero_warn(f"model.members_at_once does nothing here: a step has {counted}; leave it null")


def horizon(steps: float) -> int:
    """How many steps a selector reckons with.

    Raises:
        UserError: the run has no end.
    """
    if not 0 < steps < math.inf:
        raise UserError("model.selector needs an end to reckon with: set trainer.max_steps")
    return int(steps)
