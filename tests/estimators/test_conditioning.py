"""The subspace that a text encoder listens to: J's right singular vectors, and orthogonal directions among them."""

import gc
import math
import weakref

import pytest
import torch

from mep_lightning import PersonalizationModule
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import condition_on_ids, prompt_ids
from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimators import (
    Backprop,
    ConditioningSubspace,
    ForwardGradientEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
    conditioning,
)
from mep_lightning.estimators.conditioning import sketch
from mep_lightning.plan.rehearsal import made_up_batch

D = 12


def linear(lengths):
    """What is told of a theta of D elements: the first of them, so many times as long."""
    matrix = torch.zeros(D, len(lengths))
    matrix[range(len(lengths)), range(len(lengths))] = torch.tensor(lengths)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    return turn, lambda theta: [theta.flatten(1) @ (turn @ matrix)]


def following(lengths, share=0.9, every=50):
    turn, told = linear(lengths)
    made = ConditioningSubspace(share, every)
    made.follow(told)
    return turn, made


@pytest.mark.parametrize(
    ("lengths", "share", "k"),
    [([3.0, 1.0], 0.85, 1), ([3.0, 1.0], 0.95, 2), ([1.0] * 10, 0.45, 5), ([1.0] * 10, 1.0, 10), ([2.0], 1.0, 1)],
)
def test_as_many_dimensions_as_hold_the_share(lengths, share, k):
    turn, made = following(lengths, share)
    made.prepare(torch.randn(3, 4))
    assert made.dims_left == k == len(made.basis)
    torch.testing.assert_close(made.basis @ made.basis.T, torch.eye(k))
    if k == len(lengths):
        torch.testing.assert_close(made.basis.T @ made.basis, turn[:, :k] @ turn[:, :k].T, atol=1e-5, rtol=0)


def test_directions_are_orthogonal_as_long_as_independent_ones_and_those_of_seed_and_step():
    _, made = following([1.0] * 6, 1.0)
    made.prepare(torch.zeros(D))
    e = made.directions(seed=3, step=7, n=9)
    assert e.shape == (9, D) and torch.equal(e, made.directions(3, 7, 9))
    assert not torch.equal(e, made.directions(3, 8, 9)) and not torch.equal(e, made.directions(4, 7, 9))
    for block in (e[:6], e[6:]):
        torch.testing.assert_close(block @ block.T, 6 * torch.eye(len(block)), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.project_(e.clone()[0]), e[0], atol=1e-5, rtol=0)


def test_directions_point_anywhere_within_alike():
    """E[e e'] is the projector, so that an estimate is unbiased for the projected gradient."""
    _, made = following([1.0] * 4, 1.0)
    made.prepare(torch.zeros(D))
    drawn = torch.cat([made.directions(0, step, 3) for step in range(2_000)])
    mean = drawn.T @ drawn / len(drawn)
    torch.testing.assert_close(mean, made.basis.T @ made.basis, atol=0.06, rtol=0)
    assert drawn.mean(0).abs().max() < 0.06


@pytest.mark.parametrize("estimator", [SPSAEstimator(n=5, mu=1e-2, seed=1), ForwardGradientEstimator(n=5, seed=1)])
def test_with_as_many_directions_as_dimensions_an_estimate_is_the_projected_gradient(estimator):
    _, made = following([1.0] * 5, 1.0)
    theta, slope = torch.randn(D), torch.randn(D)
    made.prepare(theta)
    grad, _ = estimator.estimate(lambda x: x @ slope, theta, step=4, along=made.directions(1, 4, 5))
    torch.testing.assert_close(grad, made.project_(slope.clone()), atol=1e-4, rtol=1e-4)


def test_fewer_directions_leave_less_to_chance_than_independent_ones():
    """E|g|^2 is k/n of the gradient's squared length; independent directions have (k + n + 1) / n of it."""
    _, made = following([1.0] * 8, 1.0)
    theta, slope = torch.zeros(D), torch.randn(D)
    made.prepare(theta)
    inside = made.project_(slope.clone()).square().sum()
    estimator = ForwardGradientEstimator(n=4, seed=0)
    lengths = [
        estimator.estimate(lambda x: x @ slope, theta, step, along=made.directions(0, step, 4))[0].square().sum()
        for step in range(600)
    ]
    assert torch.stack(lengths).mean() / inside == pytest.approx(8 / 4, rel=0.1)


def test_a_basis_is_held_and_made_anew():
    told, made = [], ConditioningSubspace(1.0, every=3)

    def conditioned(theta):
        told.append(theta.value.flatten().clone())
        return [theta.flatten(1)[:, :2] * 2.0]

    made.follow(conditioned)
    for step in range(7):
        made.prepare(torch.full((D,), float(step)))
        made.prepare(torch.full((D,), float(step)))
        made.observe(torch.zeros(D))
    assert (
        list(dict.fromkeys(int(values[0]) for values in told)) == [0, 3, 6] and len(told) == 3 * D // 2
    )  # two of 12 dimensions at a time


def test_a_state_carries_on():
    _, made = following([1.0] * 4, 0.9, every=3)
    for _ in range(4):
        made.prepare(torch.zeros(D))
        made.observe(torch.zeros(D))
    state = made.state_dict()
    again = ConditioningSubspace(0.9, every=3)
    again.load_state_dict(state)
    again.prepare(torch.zeros(D))  # needs nothing to follow: none is due
    assert torch.equal(again.directions(0, 4, 2), made.directions(0, 4, 2))
    with pytest.raises(CheckpointError, match=r"has share=0.9, this one share=0.5; resume with the same value"):
        ConditioningSubspace(0.5, every=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="lacks share: it is damaged, or another's"):
        made.load_state_dict({"tau": 4})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"ConditioningSubspace.share is 0.0; use a number above 0 and up to 1"),
        ({"share": 1.5}, r"ConditioningSubspace.share is 1.5"),
        ({"every": 0}, r"ConditioningSubspace.every is 0; use 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ConditioningSubspace(**settings)


def test_what_it_cannot_follow_is_told():
    with pytest.raises(UserError, match="nothing to follow"):
        ConditioningSubspace().prepare(torch.zeros(D))
    deaf = ConditioningSubspace()
    deaf.follow(lambda theta: [theta.flatten(1) * 0.0])
    with pytest.raises(UserError, match="does not change with theta"):
        deaf.prepare(torch.zeros(D))
    with pytest.raises(UserError, match="no longer finite; lower lr"):
        deaf.prepare(torch.full((D,), math.nan))
    deaf.follow(lambda theta: [theta.flatten(1) * math.inf])
    with pytest.raises(UserError, match="answer is not finite: set model.activations fp32"):
        deaf.prepare(torch.ones(D))
    for lost in (lambda theta: [], lambda theta: [torch.zeros(1)]):
        deaf.follow(lost)
        with pytest.raises(UserError, match="lost its tangents"):
            deaf.prepare(torch.zeros(D))
    deaf.follow(lambda theta: [torch.fft.fft(theta)])
    with pytest.raises(
        UserError, match=r"cannot follow this base: .*fft.* has no rule for tangents; set model.subspace"
    ):
        deaf.prepare(torch.zeros(D))


def test_a_sketch_keeps_inner_products():
    generator, width = torch.Generator().manual_seed(1), 4096
    x = torch.randn(6, 10 * width + 7, generator=generator)
    x[1] += 0.5 * x[0]
    gram = lambda rows: rows @ rows.T / rows.square().sum(1).mean()  # noqa: E731
    short = sketch(x, width)
    assert short.shape == (6, width)
    torch.testing.assert_close(gram(short), gram(x), atol=0.06, rtol=0)
    assert short.sum().item() != pytest.approx(x.sum().item(), abs=1.0)  # signs, so that sums do not add up
    assert torch.equal(sketch(x[:, :width], width), x[:, :width])
    assert not torch.equal(sketch(x, width, 0), sketch(x, width, 1))


@pytest.mark.gpu
def test_a_sketch_is_bitwise_the_same_again_on_a_gpu():
    x = torch.randn(32, 77 * 768, device="cuda")
    assert all(torch.equal(sketch(x, 4096), sketch(x, 4096)) for _ in range(5))


def test_an_estimate_that_is_normalised_is_as_long_as_the_gradient():
    """Up to k directions sqrt(k / n) times as long, as orthogonal ones make it; exact for k and multiples of k."""
    _, made = following([1.0] * 8, 1.0)
    slope = torch.randn(D)
    made.prepare(torch.zeros(D))
    inside = made.project_(slope.clone())
    for n, steps in ((4, 400), (8, 1), (16, 1)):
        estimator = ForwardGradientEstimator(n=n, seed=0, normalize=True)
        squares = [
            estimator.estimate(lambda x: x @ slope, torch.zeros(D), step, 8, made.directions(0, step, n))[0].square()
            for step in range(steps)
        ]
        assert torch.stack(squares).sum(1).mean() == pytest.approx(
            inside.square().sum().item(), rel=0.1 if n < 8 else 1e-4
        )


def test_directions_must_be_as_many_as_the_estimator_asks_along():
    with pytest.raises(UserError, match="asks along 3 directions, and was given 2"):
        ForwardGradientEstimator(n=3).estimate(lambda x: x.sum(1), torch.zeros(D), along=torch.zeros(2, D))


# -- of a base ---------------------------------------------------------------------------------------------------------


def trained(precision="fp32", share=0.9, vectors=1, **settings):
    adapter = TokenEmbedding(init="ball", vectors=vectors)
    module = PersonalizationModule("tiny", precision, adapter=adapter, subspace=ConditioningSubspace(share), **settings)
    module.class_word = "ball"
    module.load()
    return module


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("width", [4096, 1024])
def test_of_tiny_it_is_what_a_dense_jacobian_says(precision, width, monkeypatch):
    """As it is, and sketched to a quarter."""
    monkeypatch.setattr(conditioning, "WIDTH", width)
    module = trained(precision)
    base, theta = module.base, module.adapter.theta.detach()
    module.subspace.prepare(theta)
    ids = prompt_ids(base, ["a photo of a <sks> ball"], module.adapter.tokens())

    def told(values):
        return condition_on_ids(base, ids, {"<sks>": values[None]}).embeds

    matrix = finite_jacobian(told, theta).double()
    energy, _ = torch.linalg.eigh(matrix.T @ matrix)
    basis = module.subspace.basis.double()
    kept = (matrix @ basis.T).square().sum() / matrix.square().sum()
    best = energy.flip(0)[: len(basis)].sum() / energy.sum()
    assert kept <= best + 1e-6
    if width == matrix.shape[0]:
        assert 0.9 <= kept < 0.93 and best - kept < 1e-4
    else:
        assert 0.88 < kept < 0.94 and 1e-6 < best - kept < 0.02


def finite_jacobian(function, theta, mu=1e-2):
    with torch.no_grad():
        moves = torch.eye(theta.numel()).view(-1, *theta.shape) * mu
        columns = [(function(theta + move) - function(theta - move)).flatten() / (2 * mu) for move in moves]
    return torch.stack(columns, dim=1)


def test_gradients_of_tiny_lie_there():
    """A tenth of the dimensions, most of every gradient: what all of this rests on."""
    module = trained()
    theta = module.adapter.theta
    module.subspace.prepare(theta)
    assert module.subspace.dims_left < 0.2 * theta.numel()
    inside = whole = 0.0
    for step in range(12):
        batch = made_up_batch(module.base, 64)
        batch["mean"] = torch.randn(batch["mean"].shape, generator=torch.Generator().manual_seed(step))
        draw = module.draw_at(batch | {"std": torch.zeros_like(batch["mean"])}, step)
        Backprop().backward(lambda members, draw=draw: module.losses(members, draw), [theta])
        whole += theta.grad.square().sum().item()
        inside += module.subspace.project_(theta.grad).square().sum().item()
        theta.grad = None
    assert inside / whole > 0.8


def test_of_sdxl_it_is_of_both_encoders_and_of_pooled_text(sdxl_folder):
    """The embeddings' Jacobian and the pooled text's, by finite differences."""
    module = PersonalizationModule(
        str(sdxl_folder), adapter=TokenEmbedding(init="ball"), subspace=ConditioningSubspace()
    )
    module.load()
    base, theta = module.base, module.adapter.theta.detach()
    module.subspace.prepare(theta)
    ids = prompt_ids(base, ["a photo of a <sks>"], module.adapter.tokens())

    def told(values):
        found = condition_on_ids(base, ids, {"<sks>": values[None]})
        return torch.cat([found.embeds.flatten(), found.pooled.flatten()])

    matrix = finite_jacobian(told, theta).double()
    energy = torch.linalg.eigvalsh(matrix.T @ matrix).flip(0)
    basis = module.subspace.basis.double()
    kept = (matrix @ basis.T).square().sum() / matrix.square().sum()
    assert kept == pytest.approx((energy[: len(basis)].sum() / energy.sum()).item(), abs=1e-3)
    assert kept >= 0.97 - 1e-3


def test_of_streamed_weights_it_is_the_same():
    bases = []
    for offload in ("none", "stream"):
        module = trained("int8", offload=offload)
        module.subspace.prepare(module.adapter.theta)
        bases.append(module.subspace.basis)
    assert torch.equal(*bases)


def test_it_holds_no_base_that_is_replaced():
    module = trained()
    module.subspace.prepare(module.adapter.theta)
    held = weakref.ref(module.base)
    copied = PersonalizationModule(subspace=module.subspace, adapter=TokenEmbedding(init="ball"))
    module.base.close()
    module.adapter.detach()
    module.base = None
    gc.collect()
    assert held() is None and copied.subspace.basis is not None


def test_a_token_of_several_vectors_has_a_subspace_of_them_all():
    module = trained(vectors=2)
    module.subspace.prepare(module.adapter.theta)
    assert module.subspace.basis.shape[1] == 256
    assert module.subspace.directions(0, 0, 3).shape == (3, 256)


def test_it_decides_whose_defaults_hold():
    assert trained("int8", estimator=RandomGradientEstimator(n="auto", mu="auto")).method == "zoodip_fast"
    assert trained("int8", estimator=ForwardGradientEstimator(n="auto")).eps == 1e-8
    assert trained().method == "textual_inversion"


def test_a_gradient_by_forward_passes_is_the_exact_one_projected():
    """n = k: neither photos nor noise are estimated, only the dimensions outside are left out."""
    module = trained(estimator=ForwardGradientEstimator(n=4, seed=0))
    theta = module.adapter.theta
    module.subspace.prepare(theta)
    module.estimator.n = k = module.subspace.dims_left
    batch = made_up_batch(module.base, 64)
    batch["mean"] = torch.randn(batch["mean"].shape, generator=torch.Generator().manual_seed(0))
    draw = module.draw_at(batch | {"std": torch.zeros_like(batch["mean"])}, 0)
    along = module.subspace.directions(0, 0, k)
    weights, _ = module.estimator.weigh(lambda members: module.losses(members, draw), k, 0, {0: theta}, along)
    Backprop().backward(lambda members: module.losses(members, draw), [theta])
    exact = module.subspace.project_(theta.grad)
    torch.testing.assert_close(
        (weights @ along).view_as(exact), exact, rtol=1e-2, atol=1e-3 * exact.norm().item() / math.sqrt(k)
    )
