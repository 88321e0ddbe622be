"""A step whose loss is not finite changes nothing and is counted, resuming stays bitwise; many in a row end a run."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData, objective
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimators import CMAES, Backprop, RandomGradientEstimator, SubspaceGradient
from mep_lightning.skipping import MOST, Skipped

QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "log_every_n_steps": 1,
}


def zeroth_order() -> PersonalizationModule:
    subspace = SubspaceGradient(tau=3, nu=1e-3)
    return PersonalizationModule(
        "tiny", "int8", TokenEmbedding(init="ball"), RandomGradientEstimator(2), subspace=subspace
    )


def token_by_backprop() -> PersonalizationModule:
    return PersonalizationModule("tiny", "int8", TokenEmbedding(init="ball"), Backprop())


def lora_by_backprop() -> PersonalizationModule:
    return PersonalizationModule("tiny", adapter=LoRA(rank=2), method="lora")


def lora_by_zeroth_order() -> PersonalizationModule:
    return PersonalizationModule("tiny", "int8", LoRA(rank=1, targets=["to_q"]), RandomGradientEstimator(1))


KINDS = [zeroth_order, token_by_backprop, lora_by_backprop]


@pytest.fixture
def broken_at(monkeypatch):
    """Makes the loss of some steps NaN, or infinite, with all its gradients."""
    losses = objective.losses

    def arrange(steps, value=float("nan")):
        def broken(module, members, draw):
            found = losses(module, members, draw)
            return found * value if module.global_step in steps else found

        monkeypatch.setattr(objective, "losses", broken)

    return arrange


def fitted(module: PersonalizationModule, folder: Path, steps: int, **given) -> PersonalizationModule:
    Trainer(max_steps=steps, default_root_dir=folder, **QUIET).fit(module, SubjectData(), **given)
    return module


def values_of(module: PersonalizationModule) -> list[torch.Tensor]:
    """What is trained, with the optimizer's state."""
    kept = [theta.detach().clone() for theta in module.adapter.parameters()]
    for state in module.trainer.optimizers[0].state.values():
        kept += [torch.as_tensor(value).clone() for value in state.values()]
    return kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [*KINDS, lora_by_zeroth_order])
def test_a_skipped_step_changes_neither_values_nor_moments(tmp_path, broken_at, make, value):
    broken_at({2, 3}, value)
    with pytest.warns(UserWarning, match="step 2 was skipped: its loss or gradient is not finite"):
        skipping = fitted(make(), tmp_path, 4)
    shorter = fitted(make(), tmp_path, 2)
    assert skipping.global_step == 4 and skipping.skipped == Skipped(2, 2)
    assert skipping.trainer.callback_metrics["train/skipped"] == 2
    for mine, other in zip(values_of(skipping), values_of(shorter), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("make", KINDS)
def test_a_run_with_skipped_steps_resumes_bitwise(tmp_path, broken_at, make):
    broken_at({2, 3, 5})
    whole = fitted(make(), tmp_path, 8)
    half = fitted(make(), tmp_path, 4)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(make(), tmp_path, 8, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.skipped == whole.skipped == Skipped(3, 0)
    for mine, other in zip(values_of(resumed), values_of(whole), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("make", KINDS)
def test_many_in_a_row_end_the_training_with_advice(tmp_path, broken_at, make):
    broken_at(range(1, 100))
    with pytest.raises(UserError, match=rf"{MOST} steps in a row up to step {MOST} .* a lower model\.lr"):
        fitted(make(), tmp_path, 50)


def test_many_that_are_not_in_a_row_do_not(tmp_path, broken_at):
    broken_at({step for step in range(2 * MOST) if step % 3})
    assert fitted(token_by_backprop(), tmp_path, 2 * MOST).skipped.total > MOST


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(tmp_path, monkeypatch):
    losses = objective.losses

    def steep(module, members, draw):
        found = losses(module, members, draw)
        found.register_hook(lambda grad: grad * float("inf"))
        return found

    monkeypatch.setattr(objective, "losses", steep)
    module = fitted(token_by_backprop(), tmp_path, 2)
    assert module.skipped == Skipped(2, 2)
    assert all(theta.isfinite().all() for theta in module.adapter.parameters())


def test_a_search_passes_over_members_and_is_skipped_without_any(tmp_path, monkeypatch):
    pytest.importorskip("cma")
    losses = objective.losses

    def partly(module, members, draw):
        found = losses(module, members, draw)
        found[: len(found) if module.global_step == 1 else 2] = float("nan")
        return found

    monkeypatch.setattr(objective, "losses", partly)
    search = CMAES(population=4, dims=4, sigma=1.0)
    module = PersonalizationModule("tiny", "int8", TokenEmbedding(init="ball"), search, method="gf_ti")
    assert fitted(module, tmp_path, 3).skipped == Skipped(1, 0)


@pytest.mark.parametrize("saved", ["2", [1], [1, -1], [1.0, 0], {"total": 1}])
def test_damaged_counts_are_refused(saved):
    with pytest.raises(CheckpointError, match=r"the checkpoint's mep\.skipped is .*: it is damaged"):
        Skipped.from_checkpoint(saved)


def test_a_checkpoint_from_before_they_were_counted_has_none():
    assert Skipped.from_checkpoint(None) == Skipped(0, 0)
