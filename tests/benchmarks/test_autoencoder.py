"""The suite's sides answer the same, or there is no figure."""

from functools import partial

import pytest
import torch

from benchmarks.documents import figures
from benchmarks.performance import autoencoder
from mep_lightning.bases import bands


def test_a_row_of_seconds_and_one_of_bytes_for_each_half(monkeypatch):
    monkeypatch.setattr(bands, "BAND", 2**16)
    measured = list(autoencoder.run(rounds=1, side=64))
    cases = [
        f"{case}, beside {other}"
        for case in ("encoding a photo", "decoding a picture")
        for other in ("the same whole", "diffusers'")
    ]
    assert [row["case"] for row in measured[::2]] == [row["case"] for row in measured[1::2]] == cases
    for seconds, peak in zip(measured[::2], measured[1::2], strict=True):
        assert seconds["ratio"] == pytest.approx(seconds["baseline"] / seconds["value"])
        assert peak["ratio"] == pytest.approx(peak["baseline"] / peak["value"])
        assert peak["ratio"] > 1 or "encoding" in peak["case"]  # of 64 px its attention takes most
    assert figures.halves(measured).count("\n") == 6
    assert bands.BAND == 2**16


def test_other_numbers_than_diffusers_give_no_figure(monkeypatch):
    made = autoencoder._half
    monkeypatch.setattr(autoencoder, "_half", lambda *about: partial(torch.add, made(*about)(), about[-1]))
    with pytest.raises(AssertionError, match="encoding a photo: other numbers than diffusers'"):
        next(autoencoder.run(rounds=1, side=64))
