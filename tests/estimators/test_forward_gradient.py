"""The forward gradient: exact derivatives along the directions that a finite difference would take."""

import math

import pytest
import torch
from torch import Tensor

from mep_lightning.errors import UserError
from mep_lightning.estimators import (
    ForwardGradientEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
    ZerothOrderMixin,
)
from mep_lightning.estimators.perturbation import TANGENT, Tangents, combine, direction
from mep_lightning.tangents import Dual

D = 6


def wavy(members: Tensor) -> Tensor:
    """Smooth and far from quadratic. [V, D] -> [V]."""
    return (members.sin() * members.exp()).sum(-1)


@pytest.fixture
def theta():
    return torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slopes(theta, n, seed=0, step=0):
    point = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(wavy(point[None]).sum(), point)
    return torch.stack([direction(theta, seed, step, i) @ gradient for i in range(n)])


def test_its_coefficients_are_the_directional_derivatives(theta):
    grad, losses = ForwardGradientEstimator(n=3, seed=4).estimate(wavy, theta, step=7)
    expected = combine(slopes(theta, 3, seed=4, step=7) / 3, theta, seed=4, step=7)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(losses, wavy(theta[None]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_it_is_what_a_finite_difference_comes_to(theta, normalize, standardize):
    settings = dict(n=3, seed=2, normalize=normalize, standardize=standardize)
    exact, _ = ForwardGradientEstimator(**settings).estimate(wavy, theta, dims=5)
    errors = [
        (RandomGradientEstimator(mu=mu, **settings).estimate(wavy, theta, dims=5)[0] - exact).norm()
        for mu in (1e-3, 1e-4, 1e-5)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-3 * exact.norm()


def test_it_is_the_gradient_on_average(theta):
    grads = [ForwardGradientEstimator(n=8).estimate(wavy, theta, step=step)[0] for step in range(2_000)]
    point = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(wavy(point[None]).sum(), point)
    stacked = torch.stack(grads)
    assert ((stacked.mean(0) - gradient) / (stacked.std(0) / math.sqrt(len(grads)))).abs().max() < 4


def test_a_step_is_repeatable_and_of_its_own(theta):
    estimate = ForwardGradientEstimator(n=2).estimate
    assert torch.equal(estimate(wavy, theta, step=3)[0], estimate(wavy, theta, step=3)[0])
    assert not torch.equal(estimate(wavy, theta, step=3)[0], estimate(wavy, theta, step=4)[0])


def test_equal_losses_tell_no_direction():
    grad, _ = ForwardGradientEstimator(n=2, standardize=True).estimate(lambda x: (0 * x).sum(-1), torch.ones(D))
    assert grad.count_nonzero() == 0


def test_tangents_are_directions_scaled_by_a_power_of_two(theta):
    found = Tangents(seed=5, step=2, n=3).of(theta)
    assert found.shape == (1, D) and math.frexp(TANGENT)[0] == 0.5
    assert torch.equal(found.value[0], theta)
    for i in range(3):
        assert torch.equal(found.tangents[i, 0], TANGENT * direction(theta, 5, 2, i))


def test_noise_that_is_drawn_ahead_is_the_same():
    parameters = {1: torch.randn(3, 4), 2: torch.randn(5)}
    members = Tangents(seed=5, step=2, n=3)
    ahead = members.drawn_for(parameters)
    assert set(ahead.noise) == {1, 2}
    for param_id, theta in parameters.items():
        assert torch.equal(ahead.of(theta, param_id).stack, members.of(theta, param_id).stack)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_forgets_its_parameter_is_refused(theta):
    with pytest.raises(UserError, match="does not depend on what is trained"):
        ForwardGradientEstimator().estimate(lambda _: torch.ones(1), theta)


def test_a_loss_of_several_numbers_is_refused(theta):
    with pytest.raises(UserError, match=r"one loss a member, \[1\], not \[1, 6\]"):
        ForwardGradientEstimator().estimate(lambda x: x * 2, theta)


def test_an_unknown_function_is_named(theta):
    with pytest.raises(NotImplementedError, match="erfinv has no rule for tangents: use a finite difference"):
        ForwardGradientEstimator().estimate(lambda x: x.erfinv().sum(-1), theta)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_directions_are_counted(n):
    with pytest.raises(UserError, match="ForwardGradientEstimator.n is"):
        ForwardGradientEstimator(n=n)


def test_in_place_perturbation_is_for_finite_differences():
    class Module(ZerothOrderMixin):
        pass

    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(UserError, match="moves parameters in place, which ForwardGradientEstimator does not: take"):
        Module().zo_backward(lambda: theta.sum(), [theta], ForwardGradientEstimator())
    Module().zo_backward(lambda: theta.sum(), [theta], SPSAEstimator())


def test_what_is_asked_for_once_is_one_dual():
    seen = []
    ForwardGradientEstimator(n=4).estimate(lambda x: seen.append(x) or wavy(x), torch.ones(D))
    (x,) = seen
    assert isinstance(x, Dual) and x.stack.shape == (5, 1, D)
