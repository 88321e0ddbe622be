"""The adapter is exported however training ends, and a failed run never spoils an earlier export."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from mep_lightning import phases
from mep_lightning.callbacks import Export
from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder


def exported(tmp_path) -> str:
    return (RunFolder(tmp_path).adapter / "learned_embeds.txt").read_text()


def test_the_trained_values_are_there_at_the_end(module, data, trainer_of, tmp_path):
    trainer_of(Export()).fit(module, data)
    assert exported(tmp_path) == repr(module.adapter.theta.tolist())
    assert not torch.equal(module.adapter.theta, torch.ones(4))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_and_ctrl_c_keep_what_was_learned_so_far(module, data, trainer_of, tmp_path, error):
    module.fail_at, module.error = 5, error
    with pytest.raises((RuntimeError, SystemExit)):
        trainer_of(Export()).fit(module, data)
    assert exported(tmp_path) == repr(module.adapter.theta.tolist())
    assert not torch.equal(module.adapter.theta, torch.ones(4))


def test_a_real_sigint_in_the_middle_of_training_exports(module, data, trainer_of, tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    step = module.training_step

    def interrupted(batch, batch_idx):
        step(batch, batch_idx)
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGINT)

    module.training_step = interrupted
    try:
        with pytest.raises(SystemExit):
            trainer_of(Export()).fit(module, data)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert exported(tmp_path) == repr(module.adapter.theta.tolist())


def test_a_run_that_fails_before_training_leaves_an_earlier_export_alone(module, data, trainer_of, tmp_path):
    adapter = RunFolder(tmp_path).adapter
    adapter.mkdir()
    (adapter / "learned_embeds.txt").write_text("trained for a week")
    module.configure_optimizers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer_of(Export()).fit(module, data)
    assert exported(tmp_path) == "trained for a week"


class Stop(Callback):
    """Ctrl-C once everything is ready to train, as while the first pictures are drawn."""

    def on_train_start(self, trainer, pl_module):
        raise KeyboardInterrupt


def test_ctrl_c_before_the_first_step_leaves_an_earlier_export_alone(module, data, trainer_of, tmp_path):
    adapter = RunFolder(tmp_path).adapter
    adapter.mkdir()
    (adapter / "learned_embeds.txt").write_text("trained for a week")
    with pytest.raises(SystemExit):
        trainer_of(Export(), Stop()).fit(module, data)
    assert exported(tmp_path) == "trained for a week"


def test_an_error_in_the_first_step_leaves_an_earlier_export_alone(module, data, trainer_of, tmp_path):
    adapter = RunFolder(tmp_path).adapter
    adapter.mkdir()
    (adapter / "learned_embeds.txt").write_text("trained for a week")
    module.fail_at = 0
    with pytest.raises(RuntimeError):
        trainer_of(Export()).fit(module, data)
    assert exported(tmp_path) == "trained for a week"


def test_a_resumed_run_that_is_stopped_at_once_exports_what_it_had_learned(module, data, trainer_of, tmp_path):
    first = trainer_of(max_steps=4)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "run.ckpt")
    resumed = type(module)()
    with pytest.raises(SystemExit):
        trainer_of(Export(), Stop()).fit(resumed, data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert exported(tmp_path) == repr(module.adapter.theta.tolist())


def test_a_failing_export_does_not_hide_the_error(module, data, trainer_of):
    def export(directory):
        raise OSError("disk full")

    module.adapter.export = export
    module.fail_at, module.error = 2, RuntimeError("the real reason")
    with (
        pytest.warns(UserWarning, match="disk full.*last checkpoint"),
        pytest.raises(RuntimeError, match="the real reason"),
    ):
        trainer_of(Export()).fit(module, data)


def test_exporting_is_the_save_phase(module, data, trainer_of, monkeypatch):
    seen = []

    class Observer:
        def enter(self, name):
            seen.append(name)

        def exit(self, name):
            pass

    monkeypatch.setattr(phases, "observers", [Observer()])
    trainer_of(Export()).fit(module, data)
    assert seen == ["save"]


def test_a_module_with_nothing_to_export_is_refused_before_training(module, data, trainer_of):
    del module.adapter
    with pytest.raises(UserError, match="Noisy has none: leave the callback out"):
        trainer_of(Export()).fit(module, data)
