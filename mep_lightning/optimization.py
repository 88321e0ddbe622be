"""Adam over what is trained, and its learning rate over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mep_lightning.errors import CheckpointError, UserError, reason
from mep_lightning.estimators import Estimator, FusedZOAdam, ZerothOrderEstimator

if TYPE_CHECKING:
    from mep_lightning.module import PersonalizationModule

SCHEDULES = ("auto", "constant", "linear", "cosine")
OPTIMIZERS = ("adam", "adam8bit")


def configure(module: PersonalizationModule, groups: list[dict[str, Any]] | None = None) -> OptimizerLRScheduler:
    """Adam over the adapter, in fp32, and its learning rate's schedule (without a Trainer it stays constant).

    Args:
        module: whose settings.
        groups: of parameters, instead of the adapter's.

    Raises:
        UserError: the schedule needs an end that the run has not.
    """
    assert not isinstance(module.lr, str) and not isinstance(module.eps, str)  # filled in by `load`
    groups = module.adapter.parameter_groups if groups is None else groups
    if module.estimator.moves_itself:
        return torch.optim.SGD(groups, lr=1.0)
    settings: dict[str, Any] = {"lr": module.lr, "betas": module.betas, "eps": module.eps}
    settings |= {"weight_decay": module.weight_decay}
    if module.optimizer == "adam" and next(module.adapter.parameters()).is_cuda:
        settings["fused"] = True  # PyTorch's own choice there takes temporaries as large as all that is trained
    kind: type[Optimizer] = FusedZOAdam if any(map(weighs, module.estimators)) else torch.optim.Adam
    if module.optimizer == "adam8bit":
        kind = adam8bit(module)
    optimizer = kind(groups, **settings)
    if module.lr_scheduler == "constant" or module._trainer is None:
        return optimizer
    steps = module.trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise UserError(
            f"model.lr_scheduler {module.lr_scheduler} needs an end to run to: set trainer.max_steps, or "
            "model.lr_scheduler constant"
        )
    schedule = get_scheduler(module.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def resume_schedule(module: LightningModule) -> None:
    """A resumed schedule runs to this run's end, which may be another than when its checkpoint was written."""
    optimizer, schedule = module.optimizers(), module.lr_schedulers()
    if isinstance(schedule, LambdaLR) and isinstance(optimizer, LightningOptimizer):
        for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch)


def refuse_odd_state(module: PersonalizationModule) -> None:
    """An optimizer takes whatever a checkpoint gives it: see that it fits what is trained before a step uses it.

    Raises:
        CheckpointError: moments of another shape than their values, or a count that is none.
    """
    for optimizer in module.trainer.optimizers:
        for theta, state in optimizer.state.items():
            for key, value in state.items():
                shape = theta.shape if key.startswith("exp_avg") else torch.Size()
                packed = key.startswith(("state", "qmap", "absmax"))  # of 8-bit moments
                if not packed and torch.as_tensor(value).shape != shape:
                    raise CheckpointError(f"the checkpoint's optimizer has a {key} of another shape: it is damaged")


def weighs(estimator: Estimator) -> bool:
    """Whether an estimator's gradient is a sum of directions: one of the user's own may make it in another way."""
    return getattr(type(estimator), "estimate", None) is ZerothOrderEstimator.estimate


def adam8bit(module: PersonalizationModule) -> Any:
    """bitsandbytes' Adam with 8-bit moments.

    Raises:
        UserError: it is not there, or not for this run.
    """
    base = module.base
    if base is not None and base.device.type != "cuda":
        raise UserError(f"model.optimizer adam8bit needs a GPU, and this run is on {base.device}: use adam")
    if any(isinstance(one, ZerothOrderEstimator) for one in module.estimators):
        raise UserError("model.optimizer adam8bit is for backpropagation alone: use adam")
    try:
        from bitsandbytes.optim import Adam8bit
    except Exception as error:  # a build for another CUDA or system fails in many ways
        raise UserError(
            f"model.optimizer adam8bit needs bitsandbytes ({reason(error)}): use adam, or install it"
        ) from error
    return Adam8bit
