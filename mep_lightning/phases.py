"""The phases of a run (load, encode, step, sample, save), so that whoever measures knows where memory goes."""

from __future__ import annotations

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
