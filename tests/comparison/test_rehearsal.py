"""The step ahead of a process's first cell: once, on a CPU, and no cell is lost by it."""

import pytest
import torch

from mep_lightning.commands import fit
from mep_lightning.comparison.rehearsal import rehearse


@pytest.fixture
def trained(monkeypatch):
    """Folders of runs; what `mep fit` returns or raises is `trained.answer`."""

    class Trained(list):
        answer = 0

        def run(self, words):
            self.append(words[words.index("--run") + 1])
            print("a progress bar")
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    found = Trained()
    monkeypatch.setattr(fit, "run", found.run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rehearse.cache_clear()
    yield found
    rehearse.cache_clear()


def test_a_process_rehearses_once_and_says_nothing(trained, capsys):
    rehearse()
    rehearse()
    assert len(trained) == 1 and not capsys.readouterr().out


def test_where_there_is_a_gpu_nothing_is_done(trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rehearse()
    assert not trained


def test_one_that_fails_is_told(trained, capsys):
    trained.answer = OSError("no room")
    rehearse()
    assert "Libraries' memory counts as this cell's" in capsys.readouterr().out


def test_a_signal_is_passed_on_and_the_next_try_rehearses(trained):
    trained.answer = 143
    with pytest.raises(KeyboardInterrupt):
        rehearse()
    trained.answer = 0
    rehearse()
    assert len(trained) == 2
