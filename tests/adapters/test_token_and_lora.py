"""Pivotal tuning: a token and a LoRA in the same steps."""

import torch
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenAndLoRA, TokenEmbedding
from mep_lightning.estimators import Backprop, SPSAEstimator
from mep_lightning.estimators.perturbation import HERE

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def fitted(folder, estimator):
    adapter = TokenAndLoRA(TokenEmbedding("<toy>"), LoRA(rank=4), token_lr=0.03)
    module = PersonalizationModule("tiny", adapter=adapter, estimator=estimator)
    Trainer(max_steps=2, accelerator="cpu", default_root_dir=folder, **QUIET).fit(module, SubjectData())
    return module


def test_both_are_trained_each_at_its_own_rate(tmp_path):
    for estimator in (Backprop(), SPSAEstimator(mu=1e-2)):
        module = fitted(tmp_path, estimator)
        word, lora = module.adapter.parts
        assert module.adapter.phrase("ball") == "<toy> ball"
        rates = [group["lr"] for group in module.optimizers().param_groups]
        assert rates == [0.03, module.lr]
        fresh = TokenAndLoRA(TokenEmbedding("<toy>"), LoRA(rank=4))
        fresh.attach(module.base, "ball")
        assert not torch.equal(word.theta, fresh.word.theta)
        assert all((a != b).any() for a, b in zip(lora.up.values(), fresh.lora.up.values(), strict=True))


def test_members_move_both_under_ids_of_their_own(tmp_path):
    module = fitted(tmp_path, SPSAEstimator(mu=0.05))
    adapter, draw = module.adapter, module.draw_at(module.trainer.datamodule.batch(0), 0)
    assert list(adapter.numbered()) == list(range(161))
    members = module.estimator.around(step=1)
    with torch.no_grad():
        together = module.losses(members, draw)
        values = {param_id: members.of(theta, param_id) for param_id, theta in adapter.numbered().items()}
        for index in range(2):
            for param_id, theta in adapter.numbered().items():
                theta.copy_(values[param_id][index])
            torch.testing.assert_close(module.losses(HERE, draw)[0], together[index], rtol=1e-4, atol=1e-6)


def test_exports_are_those_of_each_and_are_read_back(tmp_path):
    module = fitted(tmp_path, Backprop())
    paths = module.adapter.export(tmp_path)
    assert {path.name for path in paths} == set(TokenAndLoRA.FILES)
    other = TokenAndLoRA()
    other.load_export(tmp_path)
    other.attach(module.base, "ball")
    assert other.token == "<toy>"
    mine, theirs = (dict(adapter.named_parameters()) for adapter in (module.adapter, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name])
