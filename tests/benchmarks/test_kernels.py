"""The kernels suite: no figure for a wrong result, and every operation is in it."""

import os

import pytest
import torch

from benchmarks.performance import kernels as suite
from benchmarks.performance.kernels import Case
from mep_lightning import kernels
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.errors import UserError
from mep_lightning.kernels.dispatch import SWITCH


def test_an_operation_that_answers_otherwise_has_no_figure():
    right = Case("right", lambda: torch.ones(3), lambda: torch.ones(3) * 1.001, tolerance=5e-3)
    suite.refuse_unlike(right)
    with pytest.raises(AssertionError, match="wrong: ours is off by 5.00e-01"):
        suite.refuse_unlike(Case("wrong", lambda: torch.ones(3), lambda: torch.full((3,), 2.0), tolerance=5e-3))


def test_triton_is_asked_for_only_while_ours_runs(monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    assert suite._with_triton(lambda: os.environ[SWITCH])() == "triton"
    assert os.environ[SWITCH] == "torch"
    monkeypatch.delenv(SWITCH)
    suite._with_triton(lambda: None)()
    assert SWITCH not in os.environ


def test_every_operation_is_measured(monkeypatch):
    monkeypatch.setattr(suite, "TOKENS", {320: 8})
    names = {case.name.split()[0] for case in suite.cases(torch.float32, "cpu")}
    assert names == set(kernels.__all__) - {"philox_uint32"}


def test_figures_come_beside_a_librarys(monkeypatch):
    alike = Case("copy [64]", lambda: torch.ones(64), lambda: torch.ones(64), 0.0, bytes=256)
    monkeypatch.setattr(suite, "cases", lambda dtype, device: iter([alike]))
    rows = list(suite.run(rounds=1))
    assert [row["metric"] for row in rows] == ["ceiling", "ceiling", "seconds a call", "share of the roofline"]
    assert all(row["value"] > 0 for row in rows) and rows[2]["ratio"] > 0


def test_on_a_gpu_both_sides_are_replayed_or_neither(monkeypatch):
    refused, asked = [], []

    def capture(self, here):
        self.function(here)
        if len(asked) in refused:
            raise UserError("cannot be captured")
        return (here,), lambda: None, here

    monkeypatch.setattr(CUDAGraphed, "capture", capture)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    sides = {"ours": lambda: asked.append("ours"), "theirs": lambda: asked.append("theirs")}
    calls, replays = suite.as_graphs(sides, calls=3)
    assert calls == 3 and list(replays) == ["ours", "theirs"] and asked == ["ours"] * 3 + ["theirs"] * 3
    asked.clear()
    refused.append(6)  # the second side's
    assert suite.as_graphs(sides, calls=3) == (1, {})
