"""Phases: every observer is told of every beginning and end, whatever happens inside."""

import pytest

from mep_lightning import phases
from mep_lightning.phases import phase


class Notes:
    """Writes down what it is told, into a list that several may share."""

    def __init__(self, told: list[str], name: str = "") -> None:
        self.told, self.name = told, name

    def enter(self, name: str) -> None:
        self.told.append(f"{self.name}+{name}")

    def exit(self, name: str) -> None:
        self.told.append(f"{self.name}-{name}")


@pytest.fixture
def told(monkeypatch) -> list[str]:
    notes: list[str] = []
    monkeypatch.setattr(phases, "observers", [Notes(notes)])
    return notes


def test_phases_nest_and_repeat(told):
    with phase("sample"):
        with phase("load"):
            pass
        with phase("load"):
            pass
    assert told == ["+sample", "+load", "-load", "+load", "-load", "-sample"]


def test_an_error_ends_every_phase_that_it_passes_and_goes_on(told):
    with pytest.raises(KeyboardInterrupt), phase("step"), phase("encode"):
        raise KeyboardInterrupt
    with phase("save"):
        pass
    assert told == ["+step", "+encode", "-encode", "-step", "+save", "-save"]


def test_every_observer_is_told(told):
    phases.observers.append(Notes(told, "second"))
    with phase("save"):
        pass
    assert told == ["+save", "second+save", "-save", "second-save"]


def test_without_observers_the_body_runs(monkeypatch):
    monkeypatch.setattr(phases, "observers", [])
    with phase("load") as nothing:
        assert nothing is None
