"""The update of a zeroth-order step equals its parts: the estimator's gradient, the projection, PyTorch's Adam."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.estimators.perturbation import combine
from mep_lightning.kernels import subspace_project_, zo_step_

OP = torch.ops.mep_lightning.zo_step_.default


def pace(update: int, lr: float = 5e-3, betas: tuple[float, float] = (0.9, 0.999)) -> torch.Tensor:
    return torch.tensor([lr / (1 - betas[0] ** update), math.sqrt(1 - betas[1] ** update)])


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12,), (2, 64)], ids=str)
def test_equals_the_gradient_the_projection_and_adam_one_after_the_other(shape, weight_decay, projected):
    basis = torch.linalg.qr(torch.randn(math.prod(shape), 5)).Q.T.contiguous() if projected else None
    theta, grad = torch.randn(shape), torch.full(shape, math.nan)
    exp_avg, exp_avg_sq = torch.zeros(shape), torch.zeros(shape)
    parameter = torch.nn.Parameter(theta.clone())
    adam = torch.optim.Adam([parameter], lr=5e-3, eps=1e-3, weight_decay=weight_decay)
    for update in range(1, 8):
        step, weights = torch.tensor([update + 100]), torch.randn(3)
        settings = dict(seed=-3, param_id=2, eps=1e-3, weight_decay=weight_decay, basis=basis, grad=grad)
        assert zo_step_(theta, weights, exp_avg, exp_avg_sq, step, pace(update), **settings) is theta
        parameter.grad = combine(weights, parameter.detach(), -3, update + 100, 2)
        if projected:
            subspace_project_(parameter.grad, basis)
        assert torch.equal(grad, parameter.grad)
        adam.step()
        torch.testing.assert_close(theta, parameter.detach(), rtol=0, atol=1e-7 * update)
    state = adam.state[parameter]
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=1e-6, atol=1e-7)


def arguments(d: int = 12) -> tuple:
    tensors = (torch.randn(d), torch.randn(2), torch.zeros(d), torch.zeros(d), torch.tensor([1]), pace(1))
    return *tensors, 0, 0, 0.9, 0.999, 1e-8, 0.0


@pytest.mark.parametrize("projected", [True, False])
def test_opcheck(projected):
    basis = torch.linalg.qr(torch.randn(12, 5)).Q.T.contiguous() if projected else None
    torch.library.opcheck(OP, (*arguments(), basis, torch.zeros(12)))
    torch.library.opcheck(OP, (*arguments(), basis, None))


def test_works_under_fake_tensors():
    with FakeTensorMode():
        theta, weights, exp_avg, exp_avg_sq, step, speed, *_ = arguments()
        assert zo_step_(theta, weights, exp_avg, exp_avg_sq, step, speed, 0).shape == (12,)
