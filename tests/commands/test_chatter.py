"""Libraries are quiet on the command line, and nobody else is."""

import logging
import warnings

import pytest

from mep_lightning.commands.chatter import quiet_after_imports


@pytest.fixture
def loggers(monkeypatch):
    """A logger of a library at DEBUG, one of it without a level of its own, and one that is none of a library."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # or it would stay replaced
    found = [logging.getLogger(name) for name in ("peft.loud", "peft.follows", "petition.loud")]
    for logger, level in zip(found, (logging.DEBUG, logging.NOTSET, logging.DEBUG), strict=True):
        monkeypatch.setattr(logger, "level", level)
    monkeypatch.setattr(logging.getLogger("peft"), "level", logging.NOTSET)
    with warnings.catch_warnings():
        yield found


def test_libraries_say_errors_alone_and_others_what_they_like(loggers):
    quiet_after_imports()
    assert [logger.getEffectiveLevel() for logger in loggers] == [logging.ERROR, logging.ERROR, logging.DEBUG]


def test_who_debugs_hears_all(loggers, monkeypatch):
    monkeypatch.setenv("MEP_DEBUG", "1")
    quiet_after_imports()
    assert loggers[0].getEffectiveLevel() == logging.DEBUG
