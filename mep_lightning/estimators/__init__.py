"""How a gradient of the adapter comes about: backprop, zeroth order, and the subspace it is projected to."""

from mep_lightning.estimators import perturbation
from mep_lightning.estimators.backprop import Backprop
from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.estimators.fused_adam import FusedZOAdam
from mep_lightning.estimators.mixin import ZerothOrderMixin
from mep_lightning.estimators.subspace import SubspaceGradient
from mep_lightning.estimators.zeroth_order import (
    OnePointEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
    ZerothOrderEstimator,
)

__all__ = [
    "Backprop",
    "Estimator",
    "FusedZOAdam",
    "LossFn",
    "OnePointEstimator",
    "RandomGradientEstimator",
    "SPSAEstimator",
    "SubspaceGradient",
    "ZerothOrderEstimator",
    "ZerothOrderMixin",
    "perturbation",
]
