"""CMA-ES over the vocabulary's components: what it draws, what it answers, and that a resumed search is the same."""

import builtins

import pytest
import torch
from sklearn.decomposition import PCA

from mep_lightning import PersonalizationModule, SubjectData, objective
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.commands.keeping import read_checkpoint
from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimators import CMAES, SPSAEstimator, SubspaceGradient
from tests.personalizing import StopAt, fitted, trainer

WIDTH = 24


def words():
    g = torch.Generator().manual_seed(0)
    return torch.randn(500, WIDTH, generator=g) @ torch.diag(torch.linspace(0.1, 1, WIDTH)) + 0.3


def search(population=8, dims=6, **kwargs):
    estimator = CMAES(population, dims, kwargs.pop("sigma", 1.0), seed=kwargs.pop("seed", 0))
    estimator.follow(words)
    return estimator


def quadratic(target):
    return lambda values: (values - target).pow(2).flatten(1).sum(1)


def run(estimator, theta, loss_fn, steps):
    path = []
    for step in range(steps):
        grad, losses = estimator.estimate(loss_fn, theta, step)
        theta = theta - grad
        path.append((theta, losses))
    return path


@pytest.mark.parametrize("vectors", [1, 2])
def test_finds_what_lies_within_its_components(vectors):
    start = words()[:vectors]
    estimator = search()
    estimator.estimate(quadratic(start), start)
    target = start + torch.randn(vectors, 6, generator=torch.Generator().manual_seed(1)) @ estimator._basis
    theta, losses = run(search(), start, quadratic(target), 150)[-1]
    assert losses.shape == (8,)
    assert quadratic(target)(theta[None]) < 1e-3 * quadratic(target)(start[None])


def test_components_are_the_vocabularys_as_long_as_it_is_spread_along_them():
    estimator = search()
    estimator.estimate(quadratic(0), words()[:1])
    theirs = PCA(6).fit(words().numpy())
    basis = estimator._basis
    torch.testing.assert_close(basis.norm(dim=1), torch.from_numpy(theirs.explained_variance_).sqrt().float())
    cosines = (basis / basis.norm(dim=1, keepdim=True) * torch.from_numpy(theirs.components_)).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(6), rtol=0, atol=1e-4)


def test_all_members_are_asked_about_at_once_around_the_mean():
    asked = []

    def loss_fn(values):
        asked.append(values)
        return quadratic(0)(values)

    start = words()[:1]
    estimator = search(population=400, sigma=0.5)
    grad, _ = estimator.estimate(loss_fn, start)
    (values,) = asked
    assert values.shape == (400, 1, WIDTH)
    z = (values - start)[:, 0] @ torch.linalg.pinv(estimator._basis)
    assert abs(z.std() - 0.5) < 0.02 and abs(z.mean()) < 0.05
    assert torch.dist(start - grad, start) < torch.dist(values[0], start)


def test_a_resumed_search_is_bitwise_the_same():
    loss_fn, start = quadratic(words()[7:8]), words()[:1]
    whole = run(search(), start, loss_fn, 12)
    first = search()
    theta = run(first, start, loss_fn, 7)[-1][0]
    second = CMAES(8, 6, 1.0, seed=0)  # what it searches among is in its state
    second.load_state_dict(first.state_dict())
    for (mine, losses), (other, expected) in zip(run(second, theta, loss_fn, 5), whole[7:], strict=True):
        assert torch.equal(mine, other) and torch.equal(losses, expected)


def test_a_seed_draws_the_same_and_another_seed_another():
    paths = [run(search(seed=seed), words()[:1], quadratic(0), 3)[-1][0] for seed in (0, 0, 1)]
    assert torch.equal(paths[0], paths[1]) and not torch.equal(paths[0], paths[2])


def test_losses_that_are_not_finite_count_as_the_worst():
    def loss_fn(values):
        losses = quadratic(0)(values)
        losses[losses.argmin()] = float("nan")
        return losses

    theta, _ = run(search(), words()[:1], loss_fn, 30)[-1]
    assert theta.isfinite().all()


def test_a_population_without_any_loss_is_asked_again_and_moves_nothing():
    asked = []

    def loss_fn(values):
        asked.append(values)
        losses = quadratic(words()[7:8])(values)
        return losses * float("nan") if len(asked) in (1, 4, 5) else losses

    start = words()[:1]
    path = [theta for theta, _ in run(search(), start, loss_fn, 9)]
    spared = [theta for theta, _ in run(search(), start, quadratic(words()[7:8]), 6)]
    for place, before in ((0, start), (3, path[2]), (4, path[2])):
        torch.testing.assert_close(path[place], before, rtol=0, atol=1e-6)
        assert torch.equal(asked[place], asked[place + 1])
    for mine, other in zip([path[place] for place in (1, 2, 5, 6, 7, 8)], spared, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def fresh(**kwargs):
    adapter = TokenEmbedding(init="ball", vectors=kwargs.pop("vectors", 1))
    return PersonalizationModule("tiny", "int8", adapter=adapter, estimator=CMAES(6, 8, "auto"), **kwargs)


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_run_moves_the_token_to_the_populations_mean(tmp_path, vectors):
    module, run = fitted(3, tmp_path, fresh(vectors=vectors))
    assert run.global_step == 3 and module.method == "gf_ti" and module.estimator.sigma == 1.0
    (mean,) = module.estimator._tokens(module.estimator._search.mean[None], module.adapter.theta)
    torch.testing.assert_close(module.adapter.theta.detach(), mean, rtol=0, atol=1e-6)
    assert len(module.estimator._heard) == 3


def test_a_resumed_run_is_bitwise_the_same(tmp_path):
    whole, _ = fitted(6, tmp_path, fresh())
    _, first = fitted(6, tmp_path, fresh(), callbacks=[StopAt(4)])
    first.save_checkpoint(tmp_path / "four.ckpt")
    resumed = fresh()
    trainer(6, tmp_path).fit(resumed, SubjectData(seed=0), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert torch.equal(whole.adapter.theta, resumed.adapter.theta)


@pytest.mark.parametrize("infinite", [1, 6], ids=["one member", "all members"])
def test_a_run_in_which_losses_were_not_finite_resumes_bitwise(tmp_path, monkeypatch, infinite):
    losses = objective.losses

    def partly(module, members, draw):
        found = losses(module, members, draw)
        if module.global_step in (1, 3):
            found[:infinite] = float("inf")
        return found

    monkeypatch.setattr(objective, "losses", partly)
    whole, _ = fitted(6, tmp_path, fresh())
    _, first = fitted(6, tmp_path, fresh(), callbacks=[StopAt(4)])
    first.save_checkpoint(tmp_path / "four.ckpt")
    heard = read_checkpoint(tmp_path / "four.ckpt")["mep"]["estimators"][0]["heard"]
    assert len(heard) == (4 if infinite == 1 else 2) and heard.isfinite().all()
    resumed = fresh()
    trainer(6, tmp_path).fit(resumed, SubjectData(seed=0), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert torch.equal(whole.adapter.theta, resumed.adapter.theta) and whole.skipped == resumed.skipped
    assert whole.skipped.total == (0 if infinite == 1 else 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"adapter": LoRA(rank=2)}, "CMAES searches for a TokenEmbedding, not for a LoRA"),
        ({"subspace": SubspaceGradient()}, "model.subspace projects gradients, and CMAES has none: leave it out"),
        ({"low_estimator": CMAES(8, 6, 1.0)}, "CMAES is no branch of several"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        PersonalizationModule("tiny", "int8", **{"estimator": CMAES(8, 6, 1.0)} | kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 3}, "CMAES.population is 3; use 4 or more"),
        ({"dims": 1}, "CMAES.dims is 1; use 2 or more"),
        ({"sigma": 0.0}, r"CMAES.sigma is 0.0; use a number above 0"),
        ({"seed": -1}, "CMAES.seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CMAES(**settings)


def test_auto_outside_a_module_is_said():
    with pytest.raises(UserError, match="CMAES.population is 'auto' outside a module"):
        CMAES().estimate(quadratic(0), words()[:1])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import_ = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "cma":
            raise ImportError(name)
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"CMAES needs the package cma: pip install 'mep-lightning\[gf-ti\]'"):
        CMAES()


def test_a_search_given_to_two_modules_is_one_of_each():
    given = search()
    modules = [PersonalizationModule(precision="int8", estimator=given) for _ in range(2)]
    first, second = (module.estimator for module in modules)
    for estimator in (first, second):
        estimator.follow(words)
    one = run(first, words()[:1], quadratic(words()[7:8]), 3)
    other = run(second, words()[:1], quadratic(words()[7:8]), 3)
    assert all(torch.equal(mine, theirs) for (mine, _), (theirs, _) in zip(one, other, strict=True))
    assert len(first._heard) == 3 and not given._heard


@pytest.mark.parametrize(("kind", "told"), [(CMAES, "lacks basis, heard, start"), (SPSAEstimator, "keeps no state")])
def test_the_state_of_another_estimator_is_refused(kind, told):
    with pytest.raises(CheckpointError, match=told):
        kind().load_state_dict({"pace": 1})
