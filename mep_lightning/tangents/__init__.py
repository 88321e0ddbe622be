"""Derivatives carried forward: a value and its tangents go through a model in one pass, as many rows of one batch.

`Dual` is such a pair; models take it for the tensor that it stands for. What is computed of it is told by rules, one
for each function: where values lie (`structure`), functions of numbers (`elementwise`), and `layers`.
"""

from mep_lightning.tangents import elementwise, layers, structure  # noqa: F401  (they bring the rules)
from mep_lightning.tangents.dual import Dual, NoRuleError, rule

__all__ = ["Dual", "NoRuleError", "rule"]
