"""How a gradient of the adapter comes about: backprop, zeroth order, a search, and the subspace it is projected to."""

from mep_lightning.estimators import perturbation
from mep_lightning.estimators.backprop import Backprop
from mep_lightning.estimators.cma_es import CMAES
from mep_lightning.estimators.conditioning import ConditioningSubspace
from mep_lightning.estimators.estimator import Estimator, LossFn
from mep_lightning.estimators.forward_gradient import ForwardGradientEstimator
from mep_lightning.estimators.fused_adam import FusedZOAdam
from mep_lightning.estimators.mixin import ZerothOrderMixin
from mep_lightning.estimators.subspace import Subspace, SubspaceGradient
from mep_lightning.estimators.zeroth_order import (
    FiniteDifferenceEstimator,
    OnePointEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
    ZerothOrderEstimator,
)

__all__ = [
    "CMAES",
    "Backprop",
    "ConditioningSubspace",
    "Estimator",
    "FiniteDifferenceEstimator",
    "ForwardGradientEstimator",
    "FusedZOAdam",
    "LossFn",
    "OnePointEstimator",
    "RandomGradientEstimator",
    "SPSAEstimator",
    "Subspace",
    "SubspaceGradient",
    "ZerothOrderEstimator",
    "ZerothOrderMixin",
    "perturbation",
]
