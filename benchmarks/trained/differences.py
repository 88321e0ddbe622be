"""Differences between two variants, cell by cell: subjects differ by more than methods do."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FEWEST = 3
"""Cells from which on a standard error is told: of two it would hang on chance."""


@dataclass(frozen=True)
class Difference:
    """The mean over paired cells of what one variant scores beyond another.

    Attributes:
        mean: of the differences.
        error: its standard error, as if a subject's seeds were independent; None with fewer than three cells.
        cells: how many subjects and seeds both variants have.
        ahead: in how many of them the one scores more.
    """

    mean: float
    error: float | None
    cells: int
    ahead: int

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a single cell's difference: what one subject and one seed may show by chance."""
        return None if self.error is None else self.error * self.cells**0.5

    def told(self, places: int = 3) -> str:
        """As sentences and tables have it: `+.004 ± .020`."""
        error = "" if self.error is None else f" ± {_plain(self.error, places)}"
        return f"{signed(self.mean, places)}{error}"


def difference(cells: Iterable[Mapping[str, Any]], one: str, other: str, metric: str) -> Difference | None:
    """What `one` scores beyond `other` in the subjects and seeds that both have; None where there are none."""
    values: dict[str, dict[tuple[int, int], float]] = {one: {}, other: {}}
    for cell in cells:
        if cell["variant"] in values:
            values[cell["variant"]][cell["index"], cell["seed"]] = cell[metric]
    gaps = [value - values[other][pair] for pair, value in values[one].items() if pair in values[other]]
    if not gaps:
        return None
    error = round(statistics.stdev(gaps) / len(gaps) ** 0.5, 6) if len(gaps) >= FEWEST else None
    return Difference(round(statistics.mean(gaps), 6), error, len(gaps), sum(gap > 0 for gap in gaps))


def _plain(value: float, places: int) -> str:
    """Without the zero before the point."""
    return f"{value:.{places}f}".removeprefix("0")


def signed(value: float, places: int) -> str:
    """With a sign; what rounds to nothing has none."""
    plain = _plain(abs(value), places)
    if not plain.strip(".0"):
        return plain
    return f"{'+' if value > 0 else '−'}{plain}"
