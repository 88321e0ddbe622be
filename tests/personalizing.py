"""Modules and Trainers for tests on the embedded base."""

from lightning import Callback, Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.estimators import Backprop, OnePointEstimator, RandomGradientEstimator, SPSAEstimator

ESTIMATORS = {
    "backprop": Backprop,
    "rge": lambda: RandomGradientEstimator(n=2, mu=1e-3, normalize=True),
    "spsa": lambda: SPSAEstimator(n=1, mu=1e-3),
    "one-point": lambda: OnePointEstimator(n=2, mu=1e-3),
}


def module(estimator="rge", vectors=1, **kwargs):
    kwargs = {"precision": "fp32", "lr": 5e-3} | kwargs
    adapter = TokenEmbedding(init="ball", vectors=vectors)
    return PersonalizationModule(estimator=ESTIMATORS[estimator](), adapter=adapter, **kwargs)


def trainer(steps, tmp_path, **kwargs):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return Trainer(max_steps=steps, default_root_dir=tmp_path, **quiet | {"accelerator": "cpu"} | kwargs)


def fitted(steps, tmp_path, mod=None, **kwargs):
    mod = mod or module()
    run = trainer(steps, tmp_path, **kwargs)
    run.fit(mod, SubjectData(seed=0))
    return mod, run


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step
