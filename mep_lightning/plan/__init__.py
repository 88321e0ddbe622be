"""How much memory a run will take, before it is begun: rehearsed in fake tensors, and compared with a budget."""

from mep_lightning.plan.budget import Budget, best, first_fit, free_bytes, parse_size, savings
from mep_lightning.plan.rehearsal import Peak, rehearse
from mep_lightning.plan.rows import Row, plan

__all__ = ["Budget", "Peak", "Row", "best", "first_fit", "free_bytes", "parse_size", "plan", "rehearse", "savings"]
