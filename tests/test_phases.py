"""Phases: every observer is told of every beginning and end, whatever happens inside."""

import pytest

from mep_lightning import phases
from mep_lightning.phases import Stopwatch, phase


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


def test_a_stopwatch_leaves_out_what_happens_between_two_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def passes(name, seconds):
        with phase(name):
            now[0] += seconds

    with Stopwatch() as watch:
        passes("load", 5.0)
        for _ in range(3):
            passes("step", 0.25)
            now[0] += 0.25  # of the loop
        passes("sample", 8.0)
        with phase("sample"):
            passes("load", 1.0)
        passes("step", 0.25)
        passes("save", 4.0)
    passes("step", 1.0)  # it has been put away
    assert watch.steps == 4 and watch.steps_per_second == pytest.approx(2.0)
    assert watch.seconds == {"load": 6.0, "step": 1.0, "sample": 9.0, "save": 4.0}
    assert Stopwatch().steps_per_second is None
