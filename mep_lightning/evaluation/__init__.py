"""Looking at what was learned: generating pictures, scoring them, and the report that shows it all."""

from __future__ import annotations

from mep_lightning.evaluation.encoders import ClipEncoder, DinoEncoder, default_encoders
from mep_lightning.evaluation.generate import generate
from mep_lightning.evaluation.metrics import (
    ClipImageAlignment,
    ClipTextAlignment,
    DinoAlignment,
    DinoDiversity,
    evaluate,
)
from mep_lightning.evaluation.prompts import LIVING_PROMPTS, OBJECT_PROMPTS, prompts_for, without_token
from mep_lightning.evaluation.report import write_report

__all__ = [
    "LIVING_PROMPTS",
    "OBJECT_PROMPTS",
    "ClipEncoder",
    "ClipImageAlignment",
    "ClipTextAlignment",
    "DinoAlignment",
    "DinoDiversity",
    "DinoEncoder",
    "default_encoders",
    "evaluate",
    "generate",
    "prompts_for",
    "without_token",
    "write_report",
]
