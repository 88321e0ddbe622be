"""Where the cells of a comparison run: `local`, in processes of this machine, or `ray`, in the tasks of a cluster.

Whatever the engine, a batch of cells runs in a process of its own, each cell in the run's folder that it is given, and
goes on from what an earlier try left there: a comparison that one engine began, another may carry on with.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mep_lightning.comparison.cells import Batch, Cell

Ended = Generator[tuple[Cell, dict[str, Any]]]
"""Cells with their records, in the order in which they end."""


class Engine(Protocol):
    """What runs cells."""

    def run_all(self, batches: Sequence[Batch], logs: Path) -> Ended:
        """Run every cell.

        Args:
            batches: what to run; the cells of a batch train together.
            logs: the folder for what they print, a file each.

        A cell that died, or took too long, has the record `error` and `kind` "memory", "failed" or "time"; the others
        go on. A batch that died is tried again in halves. One whose process alone was told to stop has the kind
        "stopped": what it trained is saved. When the caller goes away, as with Ctrl-C, what cells have trained is saved
        first.
        """
        ...
