"""A base's float weights leave no hole in the process's memory once they are packed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mep_lightning.bases import heap
from mep_lightning.bases.weights import fill_
from mep_lightning.quantization import quantize_module_

SCRIPT = """
import torch
from torch import nn
from pathlib import Path
from mep_lightning.bases import heap
from mep_lightning.bases.weights import fill_
from mep_lightning.quantization import quantize_module_

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(160)])
quantize_module_(model)
before = resident()
weights = ((f"{i}.weight", torch.randn(1024, 1024)) for i in range(160))
fill_(model, weights, Path("."), torch.float32, torch.device("cpu"))
print(resident() - before)
"""


@pytest.mark.skipif(heap._trimming() is None, reason="the C library is not glibc")
def test_a_process_holds_little_more_than_the_packed_weights():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert 160 * 2**20 <= int(done.stdout) <= 160 * 2**20 + 100 * 2**20


def test_memory_is_given_back_portion_by_portion(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("mep_lightning.bases.heap.give_back", lambda: calls.append("portion"))
    monkeypatch.setattr("mep_lightning.bases.weights.give_back", lambda: calls.append("end"))
    monkeypatch.setattr(heap, "PORTION", 2 * 64 * 64 * 4)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(5)])
    quantize_module_(model)
    weights = ((f"{i}.weight", torch.randn(64, 64)) for i in range(5))
    fill_(model, weights, tmp_path, torch.float32, torch.device("cpu"))
    assert calls == ["portion", "portion", "end"]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_trimming", lambda: None)
    heap.give_back()
