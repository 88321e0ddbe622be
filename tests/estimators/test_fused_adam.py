"""FusedZOAdam is PyTorch's Adam on the gradient that an estimator would have answered with."""

from copy import deepcopy

import pytest
import torch

from mep_lightning.estimators import FusedZOAdam, RandomGradientEstimator, SPSAEstimator, SubspaceGradient
from mep_lightning.kernels import philox_normal, subspace_project_


def quadratic(members: torch.Tensor) -> torch.Tensor:
    return (members - 0.5).square().flatten(1).sum(1)


def weighed(estimator, theta, step, dims=None):
    return estimator.weigh(lambda members: quadratic(members.of(theta)), dims or theta.numel(), step)


@pytest.mark.parametrize("estimator", [RandomGradientEstimator(n=3, mu=1e-3, normalize=True, seed=5), SPSAEstimator(2)])
def test_trains_as_adam_does_on_the_estimated_gradient(estimator):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 24).view(2, 12)) for _ in range(2))
    fused, adam = FusedZOAdam([ours], lr=0.02, eps=1e-3), torch.optim.Adam([theirs], lr=0.02, eps=1e-3)
    subspaces = SubspaceGradient(tau=4, nu=0.1), SubspaceGradient(tau=4, nu=0.1)
    for step in range(12):
        weights, _ = weighed(estimator, ours, step, subspaces[0].dims_left)
        fused.receive(ours, weights, estimator.seed or 0, step, 0, subspaces[0].basis_on(ours.device))
        fused.step()
        grad, _ = estimator.estimate(quadratic, theirs, step=step, dims=subspaces[1].dims_left)
        theirs.grad = subspaces[1].project_(grad)
        adam.step()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        for subspace, theta in zip(subspaces, (ours, theirs), strict=True):
            subspace.observe(theta.detach())
    assert len(subspaces[0].basis) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_either_is_read_by_the_other():
    theta = torch.nn.Parameter(torch.ones(6))
    adam = torch.optim.Adam([theta], lr=0.1)
    theta.grad = torch.linspace(-1, 1, 6)
    adam.step()
    fused = FusedZOAdam([theta], lr=0.5)
    fused.load_state_dict(adam.state_dict())
    assert fused.param_groups[0]["lr"] == 0.1 and fused.state[theta]["step"] == 1
    weights = torch.tensor([0.3])
    fused.receive(theta, weights, seed=1, step=7, param_id=0)
    fused.step()
    adam.load_state_dict(fused.state_dict())
    assert adam.state[theta]["step"] == 2
    assert torch.equal(adam.state[theta]["exp_avg"], fused.state[theta]["exp_avg"])
    adam.step()
    assert adam.state[theta]["step"] == 3


def test_what_is_neither_received_nor_has_a_gradient_does_not_move():
    still, moved = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = FusedZOAdam([still, moved], lr=0.1)
    optimizer.receive(moved, torch.tensor([1.0]), seed=0, step=0, param_id=0)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(5)) and not torch.equal(moved.detach(), torch.ones(5))
    before, grad = moved.detach().clone(), moved.grad
    assert grad is not None
    optimizer.step()  # nothing new was received, and the gradient left to look at is that of the step before
    assert torch.equal(moved.detach(), before)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize(
    ("device", "fused"), [("cpu", None), ("cpu", True), pytest.param("cuda", True, marks=pytest.mark.gpu)]
)
def test_steps_by_gradients_and_by_directions_share_one_state(device, fused, count, first):
    """What selective optimisation does: whichever way a gradient comes about, the moments are Adam's."""
    made = [torch.linspace(-1, 1, 6 + i, device=device) for i in range(count)]
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in made] for _ in range(2))
    optimizer, adam = FusedZOAdam(ours, lr=0.02, fused=fused), torch.optim.Adam(theirs, lr=0.02, fused=fused)
    weights = torch.tensor([0.7, -0.2], device=device)
    for step in range(first, first + 6):
        optimizer.zero_grad()
        for param_id, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            noise = philox_normal(3, step, [0, 1], param_id, other.numel(), torch.device(device))
            other.grad = weights @ noise if step % 2 else other.detach() - 0.5
            if step % 2:
                optimizer.receive(mine, weights, 3, step, param_id, keep_grad=param_id == 0)
            else:
                mine.grad = mine.detach() - 0.5
        optimizer.step()
        adam.step()
        for param_id, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            assert (mine.grad is not None) == (step % 2 == 0 or param_id == 0)
            assert optimizer.state[mine]["step"].device == adam.state[other]["step"].device
    assert {int(optimizer.state[mine]["step"]) for mine in ours} == {6}


@pytest.mark.parametrize("written", ["loaded", "overwritten"])
def test_the_number_of_updates_is_the_states_own(written):
    """A checkpoint's, or another process': the pace of the next update is that of its number."""
    weights = torch.tensor([0.7, -0.2])

    def after(updates):
        theta = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = FusedZOAdam([theta], lr=0.02)
        for step in range(updates):
            optimizer.receive(theta, weights, 3, step, 0)
            optimizer.step()
        return theta, optimizer

    (theta, optimizer), (other, ahead) = after(2), after(30)
    if written == "loaded":
        optimizer.load_state_dict(deepcopy(ahead.state_dict()))
    else:
        for key, kept in optimizer.state[theta].items():
            kept.copy_(ahead.state[other][key])
        optimizer.recount()
    theta.data.copy_(other.detach())
    for mine, its in ((theta, optimizer), (other, ahead)):
        its.receive(mine, weights, 3, 30, 0)
        its.step()
    assert torch.equal(theta, other)


@pytest.mark.parametrize("given", ["along", "many", "basis"])
def test_autocast_rounds_no_gradient(given):
    found = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(0)
        thetas = [torch.nn.Parameter(torch.randn(64, generator=generator)) for _ in range(6 if given == "many" else 1)]
        fused = FusedZOAdam(thetas, lr=0.1)
        along = torch.randn(3, 64, generator=generator) if given == "along" else None
        basis = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q.T if given == "basis" else None
        weights = torch.randn(3, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for param_id, theta in enumerate(thetas):
                fused.receive(theta, weights, 3, 0, param_id, basis, True, along)
            fused.step()
        found.append(torch.cat([theta.grad for theta in thetas]))
        if basis is not None:
            assert (basis @ thetas[0].grad).norm() < 1e-5 * thetas[0].grad.norm()
    assert torch.equal(*found)


def test_autocast_leaves_nothing_of_what_is_projected_out():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q.T.contiguous()
    grad = torch.randn(64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        subspace_project_(grad, basis)
    assert (basis @ grad).norm() < 1e-5 * grad.norm()


def test_what_is_added_to_a_gradient_that_was_left_is_not_taken_for_it():
    theta = torch.nn.Parameter(torch.ones(5))
    optimizer = FusedZOAdam([theta], lr=0.1)
    optimizer.receive(theta, torch.tensor([1.0]), seed=0, step=0, param_id=0)
    optimizer.step()
    left, before = theta.grad.clone(), theta.detach().clone()
    theta.sum().backward()  # accumulates, as no zero_grad came between
    optimizer.step()
    assert not torch.equal(theta, before)
    torch.testing.assert_close(optimizer.state[theta]["exp_avg"], 0.9 * 0.1 * left + 0.1 * (left + 1))


def test_beside_directions_of_ones_own_others_are_projected_still():
    own, theta, alone = (torch.nn.Parameter(torch.ones(6)) for _ in range(3))
    basis = torch.eye(6)[:2]
    together, single = FusedZOAdam([own, theta], lr=0.1), FusedZOAdam([alone], lr=0.1)
    together.receive(own, torch.ones(1), seed=0, step=0, param_id=0, along=torch.ones(1, 6))
    for optimizer, parameter in ((together, theta), (single, alone)):
        optimizer.receive(parameter, torch.ones(2), seed=3, step=0, param_id=1, basis=basis)
        optimizer.step()
    assert torch.equal(theta, alone) and torch.equal(theta.grad[:2], torch.zeros(2))
    assert theta.grad[2:].abs().min() > 0 and torch.equal(own.grad, torch.ones(6))
