"""Estimators of the literature that are benchmarked beside what is shipped."""

import pytest
import torch
from lightning import Trainer

from benchmarks.literature import GuidedSearch, PromptSearch, ScalarMoment, words
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.tiny.subjects import subject


def test_guided_directions_have_half_of_their_length_in_the_span_of_the_last_updates():
    guided = GuidedSearch(last=3)
    theta = torch.zeros(1, 40)
    assert guided.directions(0, 0, 4) is None
    for number in range(5):
        guided.observe(theta)
        theta = theta + torch.randn(1, 40, generator=torch.Generator().manual_seed(number))
    directions = guided.directions(0, 5, 20_000)
    basis = torch.linalg.qr(torch.stack(list(guided.updates)).T).Q
    covariance = directions.T @ directions / len(directions)
    expected = torch.eye(40) / 2 + 40 / (2 * 3) * basis @ basis.T
    assert len(guided.updates) == 3
    assert torch.trace(covariance) == pytest.approx(40, rel=0.02)
    assert (covariance - expected).norm() < 0.1 * expected.norm()
    assert directions.equal(guided.directions(0, 5, 20_000))


def test_one_moment_makes_slopes_of_any_scale_alike():
    estimator = ScalarMoment(n=2, mu=1e-3)
    for scale in (1.0, 100.0):
        estimator.moment, estimator.told = 0.0, 0
        for step in range(50):
            slopes = torch.randn(3, generator=torch.Generator().manual_seed(step)) * scale
            weights = estimator.weights(slopes, dims=10)
        if scale == 1.0:
            first = weights
    assert weights == pytest.approx(first, rel=1e-4)


def test_a_search_starts_from_the_word_with_the_least_loss(tmp_path):
    who = subject(0)
    for number, photo in enumerate(who.photos()):
        photo.save(tmp_path / f"{number}.png")
    module = PersonalizationModule(adapter=TokenEmbedding(init="!"), lr=1e-12)
    data = SubjectData(tmp_path, class_word=who.class_word)
    trainer = Trainer(
        max_steps=1,
        callbacks=[PromptSearch(draws=1)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    table = module.base.text_encoders[0].get_input_embeddings().weight
    draw = module.draw_at(data.batch(0), 0)
    with torch.no_grad():
        found = module.losses(module.adapter.theta.detach()[None], draw)
        some = module.losses(table[words(module.base)][::20, None].float(), draw)
    nearest = (table - module.adapter.theta.detach()).norm(dim=1).min()
    assert nearest < 1e-4
    assert found.item() <= some.min().item() + 1e-5
