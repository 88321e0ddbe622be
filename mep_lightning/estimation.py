"""A step's gradient: an estimator asks for losses, some of which other processes evaluate, and a subspace projects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mep_lightning.distributed import ALONE, Ranks
from mep_lightning.draws import Draw
from mep_lightning.errors import UserError
from mep_lightning.estimators import Backprop, Estimator, FusedZOAdam, ZerothOrderEstimator
from mep_lightning.optimization import weighs

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule


def give_gradient(module: PersonalizationModule, estimator: Estimator, draw: Draw, optimizer: Optimizer) -> Tensor:
    """Give the optimizer a projected gradient, or what it makes one from; the losses [V]."""
    subspace, step, trained = module.subspace, module.global_step, module.adapter.numbered()
    if subspace:
        agreed(module, subspace.prepare, trained[0])
    dims = dims_of(module)
    if isinstance(estimator, ZerothOrderEstimator) and weighs(estimator):
        assert isinstance(optimizer, FusedZOAdam)
        along = along_of(module, estimator)
        own: dict[str, Any] = {"ranks": module.ranks} if along is None else {"ranks": module.ranks, "along": along}
        weights, losses = estimator.weigh(lambda members: module.losses(members, draw), dims, step, trained, **own)
        tell(module, estimator, optimizer, weights, along)
        return losses
    if type(estimator).estimate is Backprop.estimate:
        assert isinstance(estimator, Backprop)
        losses = estimator.backward(lambda members: module.losses(members, draw), trained.values())
        module.ranks.average_gradients_(trained.values())
        losses = module.ranks.averaged_(losses.clone())
    else:  # one of the user's own
        if len(trained) != 1:
            raise UserError(
                f"{type(estimator).__name__} estimates one parameter, and {type(module.adapter).__name__} trains "
                f"{len(trained)}: take a TokenEmbedding, or subclass ZerothOrderEstimator without its estimate()"
            )
        (theta,) = trained.values()
        exchanged = module.ranks if estimator.forward_only else ALONE  # a gradient flows from a rank's own losses
        theta.grad, losses = estimator.estimate(partial(shared_losses, module, draw, exchanged), theta, step, dims)
        if not estimator.forward_only:
            module.ranks.average_gradients_(trained.values())
    if subspace and (grad := trained[0].grad) is not None:
        subspace.project_(grad)
    return losses


def dims_of(module: PersonalizationModule) -> int:
    """In how many dimensions a step is estimated: those that the subspace leaves, or all."""
    left = module.subspace.dims_left if module.subspace else None
    return left or sum(theta.numel() for theta in module.adapter.numbered().values())


def along_of(module: PersonalizationModule, estimator: ZerothOrderEstimator) -> Tensor | None:
    """The directions of this step, fp32 [n, d], where the subspace says them."""
    if not module.subspace:
        return None
    along = module.subspace.directions(estimator.seed or 0, module.global_step, estimator.count)
    return None if along is None else along.to(module.adapter.numbered()[0].device)


def tell(
    module: PersonalizationModule,
    estimator: ZerothOrderEstimator,
    optimizer: FusedZOAdam,
    weights: Tensor,
    along: Tensor | None,
) -> None:
    """Tell the optimizer what this step's losses said about each direction: weights [n]."""
    trained = module.adapter.numbered()
    for param_id, theta in trained.items():
        basis = module.subspace.basis_on(theta.device) if module.subspace else None
        keep = len(trained) == 1  # to be looked at
        optimizer.receive(theta, weights, estimator.seed or 0, module.global_step, param_id, basis, keep, along)


def shared_losses(module: PersonalizationModule, draw: Draw, ranks: Ranks, values: Tensor) -> Tensor:
    """The losses [V] of members' values [V, ...], some or all of which other processes evaluate."""
    if not ranks.shares_members:
        return ranks.averaged_(module.losses(values, draw))
    places = list(range(ranks.rank, len(values), ranks.world))
    return ranks.gathered(module.losses(values[places], draw), places, len(values))


def hold_alike(module: PersonalizationModule) -> None:
    """Where ranks hold other values than the first's, take the first's, with the optimizer's moments."""
    trained, ranks = list(module.adapter.numbered().values()), module.ranks
    if ranks.hold_the_same(trained):
        return
    rank_zero_warn(f"at step {module.global_step} processes held other values than the first's, and took them")
    for theta in trained:
        theta.data.copy_(ranks.agreed(theta.detach()))
        for optimizer in module.trainer.optimizers:
            for kept in optimizer.state.get(theta, {}).values():
                if isinstance(kept, Tensor):
                    kept.copy_(ranks.agreed(kept))
    for optimizer in module.trainer.optimizers:
        if isinstance(optimizer, FusedZOAdam):
            optimizer.recount()


def agreed(module: PersonalizationModule, renew: Callable[[Tensor], None], theta: Tensor) -> None:
    """Let the subspace renew its basis, if that is due; on all ranks it is then the first's, down to the last bit."""
    assert module.subspace is not None
    before = module.subspace.basis
    renew(theta)
    basis = module.subspace.basis
    if basis is not None and basis is not before:
        module.subspace.adopt(module.ranks.agreed(basis))
