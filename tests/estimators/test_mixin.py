"""`zo_backward` for modules of one's own: bitwise restoring, the batched estimator's gradient, one noise for all."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from mep_lightning.distributed import Ranks
from mep_lightning.errors import UserError
from mep_lightning.estimators import OnePointEstimator, RandomGradientEstimator, SPSAEstimator, ZerothOrderMixin, mixin
from mep_lightning.estimators.perturbation import combine

ESTIMATORS = [
    RandomGradientEstimator(n=2, mu=1e-2, seed=3),
    SPSAEstimator(n=2, mu=1e-2, seed=3),
    OnePointEstimator(n=2, mu=1e-2, seed=3),
    RandomGradientEstimator(n=2, mu=1e-2, normalize=True, seed=3),
]


class Bare(ZerothOrderMixin):
    """No LightningModule at all, and no global_step."""


def loss_of(theta: Tensor) -> Tensor:
    wide = theta.to(torch.promote_types(theta.dtype, torch.float32))
    return (wide.sin() * torch.arange(theta.numel()).view(theta.shape)).sum()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_batched_estimator_and_restores_bitwise(estimator, dtype):
    parameter = nn.Parameter(torch.randn(3, 5).to(dtype))
    before = parameter.detach().clone()
    result = Bare().zo_backward(lambda: loss_of(parameter), [parameter], estimator)
    assert torch.equal(parameter, before)
    grad, losses = estimator.estimate(lambda members: torch.stack([loss_of(m) for m in members]), before, step=0)
    assert parameter.grad.dtype == dtype
    assert torch.equal(parameter.grad, grad)
    assert torch.equal(result["losses"], losses)
    assert torch.equal(result["loss"], losses.mean())


def test_a_loss_that_is_no_scalar_is_refused_and_the_parameters_are_as_before():
    parameter = nn.Parameter(torch.randn(2, 4))
    before = parameter.detach().clone()
    with pytest.raises(UserError, match=r"scalar, such as a mean, not with \[4\]"):
        Bare().zo_backward(lambda: parameter.sum(0), [parameter])
    assert torch.equal(parameter, before) and parameter.grad is None


def test_a_loss_may_be_a_plain_number():
    parameter = nn.Parameter(torch.randn(4))
    Bare().zo_backward(lambda: loss_of(parameter).item(), [parameter])
    assert parameter.grad.norm() > 0


def test_restoring_is_a_copy_and_no_subtraction():
    parameter = nn.Parameter(torch.tensor([1e8, -0.0, 1e-30, 3.0], dtype=torch.bfloat16))
    before = parameter.detach().clone().view(torch.int16)
    module = Bare()
    for _ in range(20):
        module.zo_backward(lambda: parameter.float().sum(), [parameter], SPSAEstimator(n=2, mu=1.0))
    assert torch.equal(parameter.detach().view(torch.int16), before)  # bits, so that -0.0 counts


def test_parameters_are_restored_when_the_loss_raises():
    parameter = nn.Parameter(torch.randn(4))
    before = parameter.detach().clone()

    def loss_fn() -> Tensor:
        assert not torch.equal(parameter, before)  # it was displaced
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Bare().zo_backward(loss_fn, [parameter], SPSAEstimator())
    assert torch.equal(parameter, before)
    assert parameter.grad is None


def test_several_parameters_move_together_each_with_its_own_noise():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    estimator = SPSAEstimator(n=400, mu=1e-3)
    Bare().zo_backward(lambda: nn.functional.mse_loss(model(x), y), model.parameters(), estimator)
    estimated = [parameter.grad for parameter in model.parameters()]
    exact = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.parameters())
    for ours, theirs in zip(estimated, exact, strict=True):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


def test_no_autograd_graph_is_built():
    parameter, seen = nn.Parameter(torch.randn(4)), []

    def loss_fn() -> Tensor:
        loss = parameter.square().sum()
        seen.append(loss.requires_grad)
        return loss

    Bare().zo_backward(loss_fn, [parameter])
    assert seen == [False, False]  # SPSA with n=1 by default


def test_gradients_accumulate_as_after_backward():
    parameter, module = nn.Parameter(torch.randn(4)), Bare()
    module.zo_backward(lambda: loss_of(parameter), [parameter])
    first = parameter.grad.clone()
    module.zo_backward(lambda: loss_of(parameter), [parameter])
    second = parameter.grad - first
    parameter.grad = None
    assert not torch.allclose(first, second)  # the own counter moved on, so the directions did too
    fresh = Bare()
    fresh.zo_backward(lambda: loss_of(parameter), [parameter])
    assert torch.equal(parameter.grad, first)


def test_a_parameter_named_twice_is_moved_once():
    parameter, points = nn.Parameter(torch.zeros(4)), []
    Bare().zo_backward(lambda: points.append(parameter.clone()) or loss_of(parameter), [parameter, parameter])
    torch.testing.assert_close(points[0], -points[1])
    assert points[0].norm() < 1e-3 * 4  # one displacement of mu, not two


def test_every_member_sees_the_same_random_numbers():
    parameter, draws = nn.Parameter(torch.zeros(4)), []

    def loss_fn() -> Tensor:
        draws.append(torch.randn(3))
        return parameter.sum() + draws[-1].sum()

    torch.manual_seed(5)
    module = Bare()
    module.zo_backward(loss_fn, [parameter], RandomGradientEstimator(n=3))
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.randn(3)
    assert torch.equal(torch.rand(1), after)  # the generator stands where one forward would have left it
    module.zo_backward(loss_fn, [parameter], RandomGradientEstimator(n=3))
    assert not torch.equal(draws[-1], draws[0])


class Regression(ZerothOrderMixin, LightningModule):
    """Fits a line with forward passes only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.theta = nn.Parameter(torch.zeros(3))
        self.target = torch.tensor([1.0, -2.0, 0.5])
        self.grads: list[Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = self.zo_backward(lambda: (self.theta - self.target).square().sum(), [self.theta], SPSAEstimator(n=2))
        self.grads.append(self.theta.grad.clone())
        self.losses.append(float(losses["loss"]))
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.theta], lr=0.1)


def test_trains_a_lightning_module_of_ones_own():
    module = Regression()
    trainer = Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(60, 1)))
    assert trainer.global_step == 60
    assert module.losses[-1] < 0.05 * module.losses[0]
    e0 = torch.stack(module.grads[:2])
    assert torch.cosine_similarity(e0[0], e0[1], dim=0).abs() < 0.999  # each step has its own directions


def test_the_directions_follow_global_step_so_that_a_resumed_run_repeats_them():
    class Resumed(Bare):
        global_step = 7

    estimator, theta = SPSAEstimator(seed=1), torch.randn(4)
    parameter = nn.Parameter(theta.clone())
    Resumed().zo_backward(lambda: loss_of(parameter), [parameter], estimator)
    expected, _ = estimator.estimate(lambda members: torch.stack([loss_of(m) for m in members]), theta, step=7)
    assert torch.equal(parameter.grad, expected)


def test_calls_within_one_step_have_directions_of_their_own():
    class Stepping(Bare):
        global_step = 7

    def directions(module: Stepping, *counts: int) -> list[Tensor]:
        """What each of some calls in a row moves its parameters by, [1, 4] each."""
        moved = []
        for count in counts:
            parameters = [nn.Parameter(torch.zeros(4)) for _ in range(count)]
            module.zo_backward(lambda parts=parameters: torch.stack(list(parts)).sum(), parameters, SPSAEstimator())
            moved += [nn.functional.normalize(parameter.grad, dim=0) for parameter in parameters]
        return moved

    module = Stepping()
    first = directions(module, 2, 1, 2)
    assert all((a - b).norm() > 1e-3 and (a + b).norm() > 1e-3 for i, a in enumerate(first) for b in first[:i])
    module.global_step = 8
    assert not torch.equal(directions(module, 1)[0], first[0])
    module.global_step = 7  # a checkpoint was read
    assert all(torch.equal(a, b) for a, b in zip(directions(module, 2, 1, 2), first, strict=True))


class TwoLosses(ZerothOrderMixin, LightningModule):
    """Calls `zo_backward` twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.theta = nn.Parameter(torch.zeros(3))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for target in (1.0, -2.0):
            self.zo_backward(lambda target=target: (self.theta - target).square().sum(), [self.theta])
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.theta], lr=0.1)


def test_a_resumed_run_with_several_calls_a_step_is_bitwise_the_same(tmp_path):
    def fit(steps: int, checkpoint=None) -> tuple[Trainer, TwoLosses]:
        module = TwoLosses()
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(6, 1)), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(6, tmp_path / "half.ckpt")
    _, whole = fit(6)
    assert torch.equal(resumed.theta, whole.theta)


def test_frozen_parameters_are_left_alone():
    frozen, trained = nn.Parameter(torch.ones(4), requires_grad=False), nn.Parameter(torch.ones(4))
    seen = []

    def loss_fn() -> Tensor:
        seen.append(frozen.clone())
        return (trained + frozen).square().sum()

    Bare().zo_backward(loss_fn, [frozen, trained], RandomGradientEstimator(n=2, normalize=True))
    assert all(torch.equal(value, torch.ones(4)) for value in seen)
    assert frozen.grad is None
    alone = nn.Parameter(torch.ones(4))
    Bare().zo_backward(
        lambda: (alone + 1).square().sum(), [alone], RandomGradientEstimator(n=2, normalize=True)
    )  # as if the frozen one had not been named: neither noise nor the number of dimensions counts it
    assert torch.equal(trained.grad, alone.grad)
    with pytest.raises(UserError, match="no parameter that requires a gradient"):
        Bare().zo_backward(loss_fn, [frozen])


def test_autocast_does_not_round_differences():
    parameter = nn.Parameter(torch.randn(4, 4))
    found = []
    for enabled in (False, True):
        parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Bare().zo_backward(lambda: (parameter @ parameter).float().sin().sum(), [parameter])
        found.append(parameter.grad)
    assert torch.equal(*found)


def test_a_trainer_that_scales_losses_is_refused():
    own = Bare()
    own._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(UserError, match="16-mixed divides gradients by its losses' scale"):
        own.zo_backward(lambda: torch.zeros(()), [nn.Parameter(torch.ones(1))])


class Two(Ranks):
    """One of two processes, the other of which always says the same."""

    def _reduce_(self, numbers, how=None):
        numbers += torch.arange(len(numbers), dtype=numbers.dtype) if len(numbers) != 2 else numbers


def test_over_several_processes_the_mean_of_their_losses_makes_the_gradient(monkeypatch):
    estimator, parameter = SPSAEstimator(n=2, seed=1), nn.Parameter(torch.linspace(-1, 1, 6))
    alone = Bare().zo_backward(lambda: loss_of(parameter), [parameter], estimator)["losses"]
    parameter.grad = None
    monkeypatch.setattr(mixin.Ranks, "of", lambda trainer: Two(0, 2))
    told = Bare().zo_backward(lambda: loss_of(parameter), [parameter], estimator)
    torch.testing.assert_close(told["losses"], (alone + torch.arange(4)) / 2)
    weights = estimator.weights(told["losses"], dims=6)
    assert torch.equal(parameter.grad, combine(weights, parameter.detach(), 1, 0, 0))


def test_over_several_processes_what_is_trained_begins_as_the_first_has_it(monkeypatch):
    parameter, firsts = nn.Parameter(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])
    monkeypatch.setattr(mixin.Ranks, "of", lambda trainer: Two(1, 2))
    monkeypatch.setattr(Two, "agreed", lambda self, param: firsts)
    Bare().zo_backward(lambda: loss_of(parameter), [parameter])
    assert torch.equal(parameter.detach(), firsts)


@pytest.mark.parametrize(
    ("dtype", "mu", "told"),
    [(torch.bfloat16, 1e-3, True), (torch.float16, 1e-3, True), (torch.float16, 1e-2, False), (None, 1e-3, False)],
)
def test_a_step_that_drowns_in_half_precision_is_told_once(dtype, mu, told, recwarn):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=dtype))]
    module = Bare()
    for _ in range(2):
        module.zo_backward(lambda: loss_of(parameters[1]), parameters, SPSAEstimator(mu=mu))
    assert [str(one.message).startswith(f"mu {mu:g} drowns in") for one in recwarn] == [True] * told
