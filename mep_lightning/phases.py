"""The phases of a run (load, encode, step, sample, save), so that whoever measures knows where memory goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class PhaseObserver(Protocol):
    """Told when a phase begins and ends; phases nest and repeat."""

    def enter(self, name: str) -> None: ...

    def exit(self, name: str) -> None: ...


observers: list[PhaseObserver] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the body as one of the run's phases."""
    for observer in observers:
        observer.enter(name)
    try:
        yield
    finally:
        for observer in observers:
            observer.exit(name)


class Stopwatch:
    """How long phases take, for the length of a `with`.

    Attributes:
        seconds: of every phase, those inside it included.
        steps: how often the phase "step" was entered.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._open: list[tuple[str, float]] = []
        self._first = self._last = self._between = self._pause = 0.0

    def __enter__(self) -> Stopwatch:
        observers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        observers.remove(self)

    def enter(self, name: str) -> None:
        now = time.monotonic()
        if name == "step":
            self._first = self._first or now
            self._last, self.steps = now, self.steps + 1
            self._between, self._pause = self._between + (self._pause if self.steps > 1 else 0.0), 0.0
        self._open.append((name, now))

    def exit(self, name: str) -> None:
        _, began = self._open.pop()
        took = time.monotonic() - began
        self.seconds[name] += took
        if name != "step" and not self._open:
            self._pause += took

    @property
    def steps_per_second(self) -> float | None:
        """Over all but the last step, without the phases between two of them; None of fewer than two steps."""
        span = self._last - self._first - self._between
        return (self.steps - 1) / span if self.steps > 1 and span > 0 else None
