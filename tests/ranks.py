"""Runs that several processes share: `python -m tests.ranks OUT DEVICES STRATEGY:CASE ...`; rank r writes OUT/RUN.r."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import FullUNet, LoRA, QuantizationScales
from mep_lightning.callbacks import HollowedActivations
from mep_lightning.estimators import (
    CMAES,
    Backprop,
    ConditioningSubspace,
    ForwardGradientEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
    SubspaceGradient,
)
from mep_lightning.selection import ConstantSelector

STEPS = 6


class Own(Backprop):
    """A user's estimator with a gradient that flows."""

    def estimate(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return super().estimate(*given, **named)


def module(case: str) -> PersonalizationModule:
    """A fresh module of a method."""
    int8: dict[str, Any] = {"precision": "int8", "lr": 5e-3}
    lora: dict[str, Any] = {"adapter": LoRA(rank=4), "lr": 1e-3}
    if case == "zoodip":
        one = RandomGradientEstimator(n=7, mu=1e-3, standardize=True)
        return PersonalizationModule(estimator=one, subspace=SubspaceGradient(3, 0.5), **int8)
    if case == "zoodip_fast":
        one = RandomGradientEstimator(n=4, mu=1e-3, standardize=False)
        return PersonalizationModule(estimator=one, subspace=ConditioningSubspace(every=2), **int8)
    if case == "tangents":
        return PersonalizationModule(estimator=ForwardGradientEstimator(n=4, standardize=False), **int8)
    if case == "gf_ti":
        one = CMAES(population=6, dims=8, sigma=1.0)
        return PersonalizationModule(precision="int8", estimator=one)
    if case == "a user's own":
        return PersonalizationModule(lr=5e-3, estimator=Own())
    if case == "textual_inversion":
        return PersonalizationModule(lr=5e-3)
    if case in ("lora", "hollowed_net"):
        return PersonalizationModule(method=case, **lora)
    if case in ("peqa", "tuneqdm"):
        one = QuantizationScales(input_channels=case == "tuneqdm")
        return PersonalizationModule(adapter=one, precision="int8", lr=1e-5)
    if case == "qlora":
        return PersonalizationModule(precision="int4", **lora)
    if case == "dreambooth":
        return PersonalizationModule(adapter=FullUNet(), lr=1e-5)
    if case.startswith("zeroth-order "):
        method = case.removeprefix("zeroth-order ")
        return PersonalizationModule(estimator=SPSAEstimator(n=2, mu=1e-3), precision="int8", method=method, **lora)
    assert case == "selective", case
    one = SPSAEstimator(n=2, mu=1e-3, standardize=False)
    return PersonalizationModule(
        estimator=one, precision="int8", selector=ConstantSelector(0.5), method="selective", **lora
    )


class Drift(Callback):
    """Moves what is trained on all ranks but the first, by a little."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            pl_module.adapter.theta.data[..., 0] += 1e-6


def fitted(case: str, folder: Path | None = None, **trainer: Any) -> PersonalizationModule:
    """A module that was trained for a few steps; `folder` for what it keeps meanwhile, by its case."""
    made = module("zoodip" if case == "drifted" else case)
    callbacks: list[Callback] = [Drift()] if case == "drifted" else []
    callbacks += [HollowedActivations(0.43, samples=40, folder=f"{folder}/{case}")] if "hollowed" in case else []
    settings = {"max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | trainer
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(callbacks=callbacks, **settings).fit(made, SubjectData())
    return made


def main() -> None:
    out, devices, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    for name in runs:
        strategy, _, case = name.partition(":")
        made = fitted(case, Path(out), devices=int(devices), strategy=strategy)
        found = {"theta": {k: theta.detach() for k, theta in made.adapter.numbered().items()}, "sent": made.ranks.sent}
        found["logged"] = made.trainer.callback_metrics["train/bytes_sent"].item()
        torch.save(found, Path(out) / f"{name}.{made.ranks.rank}")


if __name__ == "__main__":
    main()
