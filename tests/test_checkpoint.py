"""A stopped run carries on bitwise, and only from a checkpoint of its own."""

import math

import pytest
import torch

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenAndLoRA, TokenEmbedding
from mep_lightning.callbacks import PUTS
from mep_lightning.errors import UserError
from mep_lightning.estimators import ConditioningSubspace, SubspaceGradient
from tests.personalizing import StopAt, fitted, module, trainer


@pytest.mark.parametrize(
    ("precision", "lr_scheduler"), [("32-true", "constant"), ("bf16-mixed", "cosine"), ("bf16-true", "cosine")]
)
@pytest.mark.parametrize("estimator", ["backprop", "rge"])
def test_a_resumed_run_is_bitwise_the_same(estimator, precision, lr_scheduler, tmp_path):
    def fresh():
        return module(estimator, subspace=SubspaceGradient(tau=4, nu=0.3), lr_scheduler=lr_scheduler)

    puts = PUTS(500, 900)
    whole, _ = fitted(14, tmp_path, fresh(), callbacks=[puts], precision=precision)
    _, first = fitted(14, tmp_path, fresh(), callbacks=[puts, StopAt(9)], precision=precision)
    assert first.global_step == 9
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(14, tmp_path, callbacks=[puts], precision=precision)
    resumed = fresh()
    second.fit(resumed, SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.global_step == 14
    assert torch.equal(whole.adapter.theta, resumed.adapter.theta)
    assert torch.equal(whole.subspace.basis, resumed.subspace.basis)


@pytest.mark.parametrize("stopped", [4, 6])
def test_a_resumed_run_in_a_conditioning_subspace_is_bitwise_the_same(stopped, tmp_path):
    """Stopped where a new basis is due, and between."""

    def fresh():
        return module(subspace=ConditioningSubspace(every=4))

    whole, _ = fitted(9, tmp_path, fresh())
    _, first = fitted(9, tmp_path, fresh(), callbacks=[StopAt(stopped)])
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    trainer(9, tmp_path).fit(resumed, SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(whole.adapter.theta, resumed.adapter.theta)
    assert torch.equal(whole.subspace.basis, resumed.subspace.basis)
    other = module(subspace=SubspaceGradient(), method="zoodip_fast")
    with pytest.raises(UserError, match="it is damaged, or another's"):
        trainer(9, tmp_path).fit(other, SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: module(precision="int8"), "precision 'fp32', not 'int8'"),
        (lambda: module(seed=7), "seed 0, not 7"),
        (lambda: module("backprop"), "method 'zoodip', not 'textual_inversion'"),
        (lambda: module(subspace=SubspaceGradient()), "trained without model.subspace"),
        (lambda: module("spsa"), "estimator 'RandomGradientEstimator', not 'SPSAEstimator'"),
        (lambda: module(lr=1e-3), "lr 0.005, not 0.001"),
        (lambda: module(lr_scheduler="linear"), "lr_scheduler 'constant', not 'linear'"),
        (lambda: module(betas=(0.5, 0.999)), r"betas \[0.9, 0.999\], not \[0.5, 0.999\]"),
        (lambda: module(vectors=2), r"adapter.theta is \[1, 128\], this run's \[2, 128\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(other, message, tmp_path):
    _, run = fitted(1, tmp_path)
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=message):
        trainer(2, tmp_path).fit(other(), SubjectData(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def test_a_checkpoint_is_not_written_once_a_value_is_not_finite(tmp_path):
    mod, run = fitted(1, tmp_path)
    mod.adapter.theta.data[0, 0] = math.nan
    with pytest.raises(UserError, match="adapter.theta is no longer finite, so no checkpoint is written"):
        run.save_checkpoint(tmp_path / "nan.ckpt")
    assert not (tmp_path / "nan.ckpt").exists()


def test_a_checkpoint_that_lacks_a_trainable_is_refused(tmp_path):
    _, run = fitted(1, tmp_path)
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del saved["state_dict"]["adapter.theta"]
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(UserError, match="lacks adapter.theta"):
        trainer(2, tmp_path).fit(module(), SubjectData(), ckpt_path=tmp_path / "less.ckpt", weights_only=True)


def test_a_lora_beside_a_token_keeps_its_strength(tmp_path):
    def fresh(alpha):
        parts = TokenAndLoRA(TokenEmbedding(init="ball"), LoRA(rank=2, alpha=alpha))
        return PersonalizationModule(adapter=parts, lr=1e-3)

    _, first = fitted(2, tmp_path, fresh(2.0))
    first.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(UserError, match="adapter.alpha 2.0, not 4.0"):
        trainer(4, tmp_path).fit(fresh(4.0), SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_a_module_of_another_adapter_does_not_take_a_checkpoint_for_its_own(tmp_path):
    _, first = fitted(1, tmp_path, PersonalizationModule(adapter=LoRA(rank=2), lr=1e-3))
    first.save_checkpoint(tmp_path / "lora.ckpt")
    load = PersonalizationModule.load_from_checkpoint
    with pytest.raises(UserError, match="holds a LoRA, and this module trains a TokenEmbedding: give it the adapter"):
        load(tmp_path / "lora.ckpt", weights_only=True)
    again = load(tmp_path / "lora.ckpt", weights_only=True, adapter=LoRA(rank=2))
    learned = first.lightning_module.adapter
    assert len(again.adapter.up) == len(learned.up) > 0
    assert all(torch.equal(again.adapter.up[name], learned.up[name]) for name in learned.up)


def test_a_subspaces_checkpoint_is_read_without_one(tmp_path):
    """Lightning's own call, which resumes nothing."""
    kwargs = {"precision": "fp32", "lr": 5e-3, "subspace": SubspaceGradient(tau=2, nu=1e-6)}
    _, first = fitted(5, tmp_path, module("rge", **kwargs))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = PersonalizationModule.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(again.adapter.theta, first.lightning_module.adapter.theta)
    resumed, without = trainer(6, tmp_path), module("rge", precision="fp32", lr=5e-3)
    with pytest.raises(UserError, match="was trained with model.subspace: resume likewise"):
        resumed.fit(without, SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
