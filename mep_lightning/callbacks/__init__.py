"""What watches a run or shapes it from outside: timestep bounds, a hollow, memory, sample pictures, exports."""

from __future__ import annotations

from mep_lightning.callbacks.export import Export
from mep_lightning.callbacks.hollowed import HollowedActivations
from mep_lightning.callbacks.memory import MemoryProfiler
from mep_lightning.callbacks.prior import PriorPreservation
from mep_lightning.callbacks.puts import PUTS
from mep_lightning.callbacks.samples import Samples

__all__ = ["PUTS", "Export", "HollowedActivations", "MemoryProfiler", "PriorPreservation", "Samples"]
