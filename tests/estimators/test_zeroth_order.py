"""Estimators against analytic gradients of a quadratic, exact identities, and forward-mode derivatives."""

import math

import pytest
import torch
from torch import Tensor

from mep_lightning.errors import UserError
from mep_lightning.estimators import (
    Backprop,
    Estimator,
    OnePointEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
)
from mep_lightning.estimators.perturbation import DRAWN_TOGETHER, combine, direction, displaced, perturb

ZEROTH_ORDER = [RandomGradientEstimator, SPSAEstimator, OnePointEstimator]
D = 6


class Quadratic:
    """L(x) = x'Ax / 2 + b'x + c in float64, with its gradient."""

    def __init__(self, c: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.a, self.c = root @ root.T / D, c
        self.b, self.theta = torch.randn(2, D, generator=generator, dtype=torch.float64)
        self.calls = 0

    def __call__(self, members: Tensor) -> Tensor:  # [V, D] -> [V]
        self.calls += 1
        return 0.5 * ((members @ self.a) * members).sum(-1) + members @ self.b + self.c

    @property
    def gradient(self) -> Tensor:
        return self.a @ self.theta + self.b


def directions(theta: Tensor, n: int, seed: int = 0, step: int = 0) -> Tensor:
    return torch.stack([direction(theta, seed, step, i) for i in range(n)])  # [n, D]


def wavy(members: Tensor) -> Tensor:
    """Smooth and far from quadratic. [V, D] -> [V]."""
    return (members.sin() * members.roll(1, -1).exp()).sum(-1)


def test_backprop_is_the_gradient():
    loss = Quadratic()
    grad, losses = Backprop().estimate(loss, loss.theta)
    torch.testing.assert_close(grad, loss.gradient)
    torch.testing.assert_close(losses, loss(loss.theta[None]))
    assert not losses.requires_grad
    assert loss.calls == 2


def test_backprop_works_inside_no_grad_and_leaves_theta_alone():
    loss, theta = Quadratic(), torch.nn.Parameter(Quadratic().theta)
    with torch.no_grad():
        grad, _ = Backprop().estimate(loss, theta)
    torch.testing.assert_close(grad, loss.gradient)
    assert theta.grad is None


@pytest.mark.parametrize("mu", [1e-3, 0.5, 10.0])
def test_spsa_on_a_quadratic_is_the_mean_of_g_dot_e_times_e_whatever_mu(mu):
    loss, n = Quadratic(), 3
    grad, losses = SPSAEstimator(n=n, mu=mu).estimate(loss, loss.theta, step=5)
    e = directions(loss.theta, n, step=5)
    torch.testing.assert_close(grad, (e @ loss.gradient) @ e / n, rtol=1e-9, atol=1e-9)
    offsets = mu * torch.stack([e, -e], 1).flatten(0, 1)  # +e_0, -e_0, +e_1, ...
    torch.testing.assert_close(losses, loss(loss.theta + offsets))


@pytest.mark.parametrize("mu", [1e-3, 0.5])
def test_rge_on_a_quadratic_is_off_by_the_curvature_along_e_and_no_more(mu):
    loss, n = Quadratic(), 3
    grad, losses = RandomGradientEstimator(n=n, mu=mu).estimate(loss, loss.theta, step=5)
    e = directions(loss.theta, n, step=5)
    coefficients = e @ loss.gradient + 0.5 * mu * ((e @ loss.a) * e).sum(-1)
    torch.testing.assert_close(grad, coefficients @ e / n, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(losses[0], loss(loss.theta[None])[0])


def test_one_point_weighs_each_direction_by_its_loss():
    loss, n, mu = Quadratic(), 3, 0.1
    grad, losses = OnePointEstimator(n=n, mu=mu).estimate(loss, loss.theta)
    e = directions(loss.theta, n)
    torch.testing.assert_close(losses, loss(loss.theta + mu * e))
    torch.testing.assert_close(grad, (losses / mu) @ e / n)


@pytest.mark.parametrize("cls", [RandomGradientEstimator, SPSAEstimator])
def test_the_coefficient_tends_to_the_directional_derivative(cls):
    theta = torch.linspace(-1, 1, D, dtype=torch.float64)
    e = direction(theta, 0, 0, 0)
    _, slope = torch.func.jvp(lambda x: wavy(x[None])[0], (theta,), (e,))
    assert slope.abs() > 0.1
    errors = [(cls(n=1, mu=mu).estimate(wavy, theta)[0] - slope * e).norm() / slope.abs() for mu in (1e-2, 1e-4)]
    order = 2 if cls is SPSAEstimator else 1
    assert errors[1] < errors[0] * 100**-order * 1.5  # truncation falls with mu, or with its square
    assert errors[1] < (1e-6 if cls is SPSAEstimator else 1e-2)


@pytest.mark.parametrize("cls", ZEROTH_ORDER)
def test_the_expectation_is_the_gradient(cls):
    loss, n = Quadratic(c=0.0), 2000
    mu = 1.0 if cls is OnePointEstimator else 1e-3  # one-point's variance grows with 1 / mu^2; its mean does not move
    grad, losses = cls(n=n, mu=mu).estimate(loss, loss.theta)
    e = directions(loss.theta, n)
    samples = cls(n=n, mu=mu).coefficients(losses)[:, None] * e  # [n, D]
    deviation = samples.std(0) / math.sqrt(n)
    assert ((grad - loss.gradient).abs() < 4.5 * deviation).all()
    assert deviation.norm() < 0.35 * loss.gradient.norm()  # the bound above means something


@pytest.mark.parametrize("cls", ZEROTH_ORDER)
@pytest.mark.parametrize("dims", [None, 4])
def test_normalising_divides_by_zoodips_factor(cls, dims):
    loss, n = Quadratic(), 2
    plain, _ = cls(n=n).estimate(loss, loss.theta)
    normalized, _ = cls(n=n, normalize=True).estimate(loss, loss.theta, dims=dims)
    torch.testing.assert_close(normalized, plain / math.sqrt(((dims or D) + n - 1) / n))


@pytest.mark.parametrize("cls", [RandomGradientEstimator, SPSAEstimator])
def test_standardising_divides_by_the_losses_standard_deviation(cls):
    loss, n, mu = Quadratic(), 3, 1e-2
    plain, losses = cls(n=n, mu=mu).estimate(loss, loss.theta)
    standardized, _ = cls(n=n, mu=mu, standardize=True).estimate(loss, loss.theta)
    std = (losses - losses.mean()).square().mean().sqrt()
    torch.testing.assert_close(standardized, plain * mu / std)


def test_a_standardised_estimate_does_not_know_the_losss_scale():
    loss, estimator = Quadratic(), RandomGradientEstimator(n=4, mu=1e-4, standardize=True)
    once, thousandfold = (estimator.estimate(lambda x, k=k: k * loss(x), loss.theta)[0] for k in (1, 1000))
    torch.testing.assert_close(once, thousandfold)
    assert once.norm() > 0.1


def test_equal_losses_standardised_tell_no_direction():
    grad, _ = RandomGradientEstimator(n=2, standardize=True).estimate(lambda x: torch.ones(len(x)), torch.zeros(3))
    assert torch.equal(grad, torch.zeros(3))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_standardised_loss_that_is_not_finite_is_not_taken_for_no_gradient(wrong):
    estimator = RandomGradientEstimator(n=2, standardize=True)
    grad, _ = estimator.estimate(lambda x: torch.tensor([1.0, wrong, 2.0]), torch.zeros(3))
    assert not grad.isfinite().any()


def test_standardize_auto_says_what_to_do():
    with pytest.raises(UserError, match="SPSAEstimator.standardize is 'auto' outside a module"):
        SPSAEstimator(standardize="auto").estimate(lambda x: x.sum(-1), torch.zeros(3))


def test_normalised_estimates_are_as_long_as_the_gradient_on_average():
    loss = Quadratic()
    estimator = SPSAEstimator(n=2, normalize=True)
    squares = [estimator.estimate(loss, loss.theta, step=k)[0].square().sum() for k in range(1500)]
    # E|g|^2 of n directions is (d + n + 1) / n |grad|^2: the paper's factor has n - 1, close for the d of a token.
    expected = (D + 2 + 1) / (D + 2 - 1) * loss.gradient.square().sum()
    torch.testing.assert_close(torch.stack(squares).mean(), expected, rtol=0.15, atol=0)


@pytest.mark.parametrize(("cls", "members"), [(RandomGradientEstimator, 4), (SPSAEstimator, 6), (OnePointEstimator, 3)])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_the_loss_is_called_once_with_all_members_and_without_autograd(cls, members, shape):
    seen = []

    def loss_fn(points: Tensor) -> Tensor:
        seen.append((points, torch.is_grad_enabled()))
        return points.flatten(1).square().mean(1)

    theta = torch.nn.Parameter(torch.randn(shape))
    before = theta.detach().clone()
    estimator = cls(n=3)
    grad, losses = estimator.estimate(loss_fn, theta)
    ((points, grad_enabled),) = seen
    assert estimator.members == members == len(points)
    assert points.shape == (members, *shape)
    assert (grad.shape, grad.dtype, losses.shape) == (shape, torch.float32, (members,))
    assert not grad_enabled
    assert not points.requires_grad
    assert torch.equal(theta, before)
    assert estimator.forward_only


def test_rge_evaluates_theta_itself_first():
    theta = torch.randn(5)
    points = perturb(theta, RandomGradientEstimator(n=2).probes, 1e-3, seed=0, step=0)
    assert torch.equal(points[0], theta)
    assert not torch.equal(points[1], points[2])


@pytest.mark.parametrize("cls", ZEROTH_ORDER)
def test_an_estimate_is_a_pure_function_of_seed_and_step(cls):
    loss = Quadratic()

    def grad(seed: int | None, step: int) -> Tensor:
        return cls(n=2, mu=1e-2, seed=seed).estimate(loss, loss.theta, step=step)[0]

    assert torch.equal(grad(3, 7), grad(3, 7))
    assert torch.equal(grad(None, 7), grad(0, 7))
    assert not torch.isclose(grad(3, 7), grad(3, 8)).any()
    assert not torch.isclose(grad(3, 7), grad(4, 7)).any()


@pytest.mark.parametrize("size", [5, DRAWN_TOGETHER // 3, DRAWN_TOGETHER + 1])
def test_the_directions_do_not_depend_on_how_many_there_are(size):
    theta = torch.randn(size)
    few, many = (perturb(theta, RandomGradientEstimator(n=n).probes, 1e-3, 0, 4) for n in (2, 5))
    assert torch.equal(few, many[:3])
    assert torch.equal(many[5], displaced(theta, (4, 1.0), 1e-3, 0, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_members_keep_thetas_dtype_and_are_rounded_once(dtype):
    theta = torch.randn(50).to(dtype)
    member = displaced(theta, (1, -1.0), 0.1, seed=0, step=0)
    wide = theta.double() - 0.1 * direction(theta, 0, 0, 1).double()
    assert member.dtype == dtype
    assert ((member.double() - wide).abs() <= wide.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()
    grad, losses = SPSAEstimator(n=2, mu=0.1).estimate(lambda x: x.square().sum(-1), theta)
    assert grad.dtype == dtype
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_parameters_have_their_own_noise():
    theta = torch.zeros(40)
    one, two = direction(theta, 0, 0, 0, param_id=0), direction(theta, 0, 0, 0, param_id=1)
    assert not torch.isclose(one, two).any()
    torch.testing.assert_close(
        combine(torch.tensor([2.0, -1.0]), theta, 0, 0, 1), 2 * two - direction(theta, 0, 0, 1, 1)
    )


def test_a_loss_that_is_not_finite_comes_back_as_it_is():
    grad, losses = RandomGradientEstimator(n=1).estimate(lambda x: torch.tensor([1.0, math.inf]), torch.zeros(3))
    assert losses.tolist() == [1.0, math.inf]
    assert not grad.isfinite().any()


@pytest.mark.parametrize("cls", ZEROTH_ORDER)
def test_n_auto_says_what_to_do(cls):
    estimator = cls(n="auto")
    with pytest.raises(UserError, match=f"{cls.__name__}.n is 'auto'.*n=2"):
        estimator.estimate(lambda x: x.sum(-1), torch.zeros(3))


@pytest.mark.parametrize("cls", ZEROTH_ORDER)
def test_mu_auto_says_what_to_do(cls):
    estimator = cls(mu="auto")
    with pytest.raises(UserError, match=f"{cls.__name__}.mu is 'auto'.*mu=1e-3"):
        estimator.estimate(lambda x: x.sum(-1), torch.zeros(3))
    estimator.mu = 1e-2  # as the module does
    estimator.estimate(lambda x: x.sum(-1), torch.zeros(3))


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"mu": 0.0}, {"mu": -1e-3}, {"mu": math.nan}, {"mu": math.inf}], ids=str)
def test_impossible_settings_are_refused_by_name(kwargs):
    (name,) = kwargs
    with pytest.raises(UserError, match=rf"SPSAEstimator\.{name} is"):
        SPSAEstimator(**kwargs)


def test_a_loss_of_the_wrong_shape_is_refused_rather_than_broadcast():
    with pytest.raises(UserError, match=r"\[3\], not \[\]"):
        RandomGradientEstimator(n=2).estimate(lambda x: x.sum(), torch.zeros(4))


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Estimator()


@pytest.mark.parametrize("cls", [RandomGradientEstimator, SPSAEstimator, OnePointEstimator, Backprop])
def test_the_command_line_finds_estimators_by_name(cls):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--estimator", type=Estimator)
    extra = [] if cls is Backprop else ["--estimator.mu", "auto", "--estimator.n", "4"]
    built = parser.instantiate_classes(parser.parse_args(["--estimator", cls.__name__, *extra])).estimator
    assert type(built) is cls
    assert cls is Backprop or (built.mu, built.n) == ("auto", 4)
