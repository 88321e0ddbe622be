"""Selective optimisation: two branches, one optimizer, one wrapped step."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import FullUNet, LoRA
from mep_lightning.commands.keeping import LastCheckpoint
from mep_lightning.errors import UserError
from mep_lightning.estimators import FusedZOAdam, RandomGradientEstimator, SPSAEstimator, SubspaceGradient
from mep_lightning.selection import ConstantSelector, TimestepAwareSelector

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)


def module(selector=None, **settings):
    return PersonalizationModule(
        "tiny",
        adapter=LoRA(rank=4),
        estimator=SPSAEstimator(n=1, mu=1e-2, normalize=True),
        selector=selector or ConstantSelector(0.5),
        **settings,
    )


class Watch(Callback):
    """What every step logged, and how large its latents were."""

    def __init__(self):
        self.logged, self.sides = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def watch(self, mod):
        losses = mod.losses
        mod.losses = lambda members, draw: (
            self.sides.append((draw.noisy.shape[-1], len(members))) or losses(members, draw)
        )


def fitted(folder, mod, steps, ckpt=None, every=100):
    watch = Watch()
    watch.watch(mod)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[watch, LastCheckpoint(every)], default_root_dir=folder, **QUIET
    )
    trainer.fit(mod, SubjectData(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return watch


def values(mod):
    return [theta.detach().clone() for theta in mod.adapter.parameters()]


def test_each_branch_has_its_estimator_and_its_resolution(tmp_path):
    mod = module()
    watch = fitted(tmp_path, mod, 8)
    assert mod.method == "selective" and mod.low_resolution == 48
    high = [entry["train/high"] == 1 for entry in watch.logged]
    assert watch.sides == [(16, 2) if here else (12, 1) for here in high]
    assert 0 < sum(high) < 8
    assert {"train/loss_high", "train/loss_low", "train/timestep"} <= set(watch.logged[-1])
    optimizer = mod.optimizers().optimizer
    assert isinstance(optimizer, FusedZOAdam)
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}  # one optimizer counts every step


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_either_branch_alone_moves_every_factor(tmp_path, chance):
    mod = module(ConstantSelector(chance))
    watch = fitted(tmp_path, mod, 3)
    assert {side for side, _ in watch.sides} == ({16} if chance else {12})
    start = LoRA(rank=4)
    start.attach(mod.base)
    moved = [bool((a != b).any()) for a, b in zip(values(mod), start.parameters(), strict=True)]
    assert all(moved)


def test_a_resumed_run_is_bitwise_the_same_even_to_another_end(tmp_path):
    """The selector reckons with the steps of the first run, which the checkpoint keeps."""
    selector = TimestepAwareSelector(warmup=0.0)
    whole = module(selector)
    fitted(tmp_path / "whole", whole, 6)
    again = module(selector)
    stopped = module(selector)
    stopped.horizon = 6
    fitted(tmp_path / "stopped", stopped, 3)
    watch = fitted(tmp_path / "stopped", again, 6, ckpt=str(tmp_path / "stopped/checkpoints/last.ckpt"))
    assert again.horizon == 6 and len(watch.sides) == 3
    for mine, other in zip(values(again), values(whole), strict=True):
        assert torch.equal(mine, other)


def test_a_run_without_an_end_is_refused(tmp_path):
    trainer = Trainer(max_steps=-1, max_epochs=-1, accelerator="cpu", default_root_dir=tmp_path, **QUIET)
    with pytest.raises(UserError, match="model.selector needs an end to reckon with: set trainer.max_steps"):
        trainer.fit(module(), SubjectData())


def test_zeroth_order_alone_trains_a_lora_in_int8(tmp_path):
    mod = PersonalizationModule(
        "tiny", "int8", adapter=LoRA(rank=4, freeze_down=True), estimator=RandomGradientEstimator(n=2, mu=1e-2)
    )
    mod.class_word = "ball"
    mod.load()
    before = values(mod)
    fitted(tmp_path, mod, 2)
    after = values(mod)
    half = len(after) // 2
    assert all(torch.equal(a, b) for a, b in zip(before[:half], after[:half], strict=True))  # A stays as it was drawn
    assert all((a != b).any() for a, b in zip(before[half:], after[half:], strict=True))


def test_parts_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="model.subspace is for a TokenEmbedding"):
        PersonalizationModule(adapter=LoRA(), estimator=SPSAEstimator(), subspace=SubspaceGradient())
    with pytest.raises(UserError, match="FullUNet is trained by backpropagation alone: set Backprop"):
        PersonalizationModule(adapter=FullUNet(), estimator=SPSAEstimator())
    with pytest.raises(UserError, match="model.optimizer is sgd; use one of adam, adam8bit"):
        PersonalizationModule(optimizer="sgd")
    mod = PersonalizationModule(optimizer="adam8bit")
    mod.class_word = "ball"
    mod.load()
    with pytest.raises(UserError, match="model.optimizer adam8bit needs a GPU, and this run is on cpu: use adam"):
        mod.configure_optimizers()


@pytest.mark.parametrize("low", [64, 128])
def test_a_low_resolution_that_is_not_lower_is_refused(low, tmp_path):
    mod = module()
    mod.low_resolution = low
    with pytest.raises(UserError, match=f"model.low_resolution is {low}; use less than data.resolution, which is 64"):
        fitted(tmp_path, mod, 1)
