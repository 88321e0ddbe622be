"""Estimators of the literature that are benchmarked beside what is shipped."""

import pytest
import torch
from lightning import Trainer

from benchmarks.trained.literature import (
    BestOfPopulation,
    GuidedSearch,
    NeighbouringPoints,
    OwnNoise,
    PromptSearch,
    RandomDirections,
    ScalarMoment,
    UnitComponents,
    words,
)
from benchmarks.trained.quality import photos_of
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.estimators import CMAES
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


def test_a_search_along_random_directions_draws_entries_that_vary_as_the_vocabularys():
    table = 0.3 + 0.02 * torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    search = RandomDirections(population=4, dims=32, sigma=1.0, seed=0)
    search.follow(lambda: table)
    search.estimate(lambda values: values.flatten(1).sum(1), table[:1])
    z = torch.randn(4_000, 32, generator=torch.Generator().manual_seed(1)).double().numpy()
    moved = search._tokens(z, table[:1]) - table[:1]
    assert moved.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.linalg.matrix_rank(search._basis) == 32


def test_components_of_length_one_lead_far_from_where_words_are():
    table = 0.3 + 0.02 * torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    search = UnitComponents(population=4, dims=32, sigma=1.0, seed=0)
    search.follow(lambda: table)
    search.estimate(lambda values: values.flatten(1).sum(1), table[:1])
    torch.testing.assert_close(search._basis @ search._basis.T, torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(search._start, table[:1] + table.mean(0))
    plain = CMAES(population=4, dims=32, sigma=1.0, seed=0)
    plain.follow(lambda: table)
    plain.estimate(lambda values: values.flatten(1).sum(1), table[:1])
    cosines = (plain._basis * search._basis).sum(1) / plain._basis.norm(dim=1)
    torch.testing.assert_close(cosines, torch.ones(32))


def test_the_best_of_a_population_is_one_of_its_members_and_leaves_the_search_as_it_was():
    table = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    theta, heard, means = table[:1], [], []

    def loss_fn(values):
        heard.append(values)
        return values.pow(2).flatten(1).sum(1)

    for kind in (BestOfPopulation, CMAES):
        search = kind(population=6, dims=4, sigma=1.0, seed=0)
        search.follow(lambda: table)
        here = theta
        for _ in range(3):
            grad, losses = search.estimate(loss_fn, here)
            here = here - grad
        means.append(search._search.mean)
        if kind is BestOfPopulation:
            torch.testing.assert_close(here, heard[-1][losses.argmin()])
    assert (means[0] == means[1]).all()


def test_every_member_hears_a_noise_of_its_own_on_the_same_latents(tiny_base, monkeypatch):
    who = subject(0)
    module = OwnNoise(adapter=TokenEmbedding(init="!"), method="gf_ti")
    module.class_word = who.class_word
    module.take(tiny_base)
    with photos_of(who) as folder:
        data = SubjectData(folder, class_word=who.class_word)
        data.encode(tiny_base)
    draw, told = module.draw_at(data.batch(0), 0), []
    monkeypatch.setattr(PersonalizationModule, "losses", lambda self, member, own: told.append(own) or torch.zeros(1))
    assert module.losses(torch.zeros(3, 1, 128), draw).shape == (3,)
    kept = tiny_base.scheduler.alphas_cumprod[draw.timestep][:, None, None, None]
    latents = [(own.noisy - (1 - kept).sqrt() * own.target) / kept.sqrt() for own in (draw, *told)]
    assert len(told) == 3
    assert len({own.target.sum().item() for own in (draw, *told)}) == 4
    for own in latents[1:]:
        torch.testing.assert_close(own, latents[0], rtol=0, atol=1e-3)


def test_differences_of_neighbouring_points_are_the_gradient_on_average():
    slope = torch.linspace(-1, 1, 24)
    estimator = NeighbouringPoints(n=500, mu=1e-2, seed=3)
    grad, losses = estimator.estimate(lambda values: (values * slope).sum(1), torch.zeros(24))
    assert losses.shape == (500,)
    assert torch.nn.functional.cosine_similarity(grad, slope, dim=0) > 0.9
    assert grad @ slope == pytest.approx((slope @ slope).item(), rel=0.2)
