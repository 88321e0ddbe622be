"""Who answers for an operation, and what is said when Triton does not."""

import sys
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.kernels import dispatch, philox_normal
from mep_lightning.kernels.dispatch import SWITCH, launches, runs_triton, why_not_triton


@pytest.fixture(autouse=True)
def forget():
    why_not_triton.cache_clear()
    yield
    why_not_triton.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a recent GPU."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


def test_the_switch_turns_triton_off(gpu, monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    assert why_not_triton() == "switched off by MEP_KERNELS=torch"


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_triton() == "there is no CUDA device"
    assert not runs_triton(torch.zeros(1))


def test_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert why_not_triton() == "the GPU has compute capability 7.5, and they need 8.0 or more"


def test_triton_missing(gpu, monkeypatch):
    monkeypatch.delitem(sys.modules, "mep_lightning.kernels.philox.triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in why_not_triton() and "pip install triton" in why_not_triton()


def test_triton_broken(gpu, monkeypatch):
    def fail(name):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    assert why_not_triton() == "Triton cannot compile here (Failed to find C compiler. Please specify via CC)"


def test_noise_does_not_need_it():
    assert philox_normal(0, 0, 0, 0, 5).shape == (5,)


def test_a_kernel_is_launched_where_its_first_tensor_lies(monkeypatch):
    there = []

    def device_of(tensor):
        there.append(tensor.device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda:1")
    twice = launches(lambda number, tensor: number * 2)
    assert twice(3, on_gpu) == 6 and there == [torch.device("cuda:1")]
    assert twice(3, torch.ones(2)) == 6 and twice(3, None) == 6 and len(there) == 1


def test_triton_answers_for_numbers_alone(monkeypatch):
    """Neither for tensors that hold nothing, as a plan's, nor while code is traced."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda index: None)
    with FakeTensorMode():
        assert not runs_triton(torch.empty(2, device="cuda"))
    gpu = MagicMock(is_cuda=True)
    assert runs_triton(gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not runs_triton(gpu)
