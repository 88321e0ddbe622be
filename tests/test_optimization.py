"""The learning rate over a run, and over one that is resumed."""

import csv

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from mep_lightning import SubjectData
from mep_lightning.errors import UserError
from tests.personalizing import StopAt, fitted, module, trainer


class LearningRates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "linear": [1.0, 0.75, 0.5, 0.25],
        "cosine": [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
    }.items(),
)
def test_the_learning_rate_follows_its_schedule(name, expected, tmp_path):
    rates = LearningRates()
    fitted(4, tmp_path, module("backprop", lr=2.0, lr_scheduler=name), callbacks=[rates])
    assert rates.seen == pytest.approx([2 * factor for factor in expected])


@pytest.mark.parametrize(("first", "last"), [(4, 8), (4, 6), (8, 6)])
def test_a_resumed_schedule_runs_to_the_end_of_the_resumed_run(first, last, tmp_path):
    """Also when it had come to 0; after step 4 of 8 and of 6 in all, lr is what an uninterrupted run would have."""
    stop, rates = StopAt(4), LearningRates()
    _, run = fitted(first, tmp_path, module("backprop", lr=2.0, lr_scheduler="linear"), callbacks=[stop])
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(last, tmp_path, callbacks=[rates])
    resumed = module("backprop", lr=2.0, lr_scheduler="linear")
    again.fit(resumed, SubjectData(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rates.seen == pytest.approx([2 * (1 - step / last) for step in range(4, last)])


def test_a_monitor_sees_the_learning_rate_at_every_step(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(
        4,
        tmp_path,
        module("backprop", lr=2.0, lr_scheduler="linear"),
        logger=logger,
        log_every_n_steps=1,
        callbacks=[LearningRateMonitor()],
    )
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rates = [float(row["lr-Adam"]) for row in csv.DictReader(file) if row["lr-Adam"]]
    assert rates == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_schedule_without_an_end_is_refused(tmp_path):
    mod, endless = module("backprop", lr_scheduler="linear"), trainer(-1, tmp_path, max_epochs=-1)
    with pytest.raises(UserError, match="model.lr_scheduler linear needs an end to run to: set trainer.max_steps"):
        endless.fit(mod, SubjectData(seed=0, repeats=1))
