"""Memory figures: exact where they can be, honest elsewhere, nested, and free of charge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageColor
from torch import nn

from mep_lightning import phases
from mep_lightning.callbacks import MemoryProfiler
from mep_lightning.callbacks.memory import with_earlier
from mep_lightning.callbacks.meter import KINDS, MemoryMeter
from mep_lightning.errors import UserError
from mep_lightning.evaluation import plots
from mep_lightning.phases import phase
from mep_lightning.run_folder import RunFolder, write_atomically
from tests.callbacks.test_meter import MIB, Base, block


def read(tmp_path) -> dict:
    return json.loads(RunFolder(tmp_path).memory_json.read_text())


class Heavy(LightningModule):
    """Weights of 80 MiB, gradients and momentum of 40 MiB each; a step needs 160 MiB and a product of 40.

    (From 32 MiB on, the C allocator gives every tensor pages of its own and returns them at once, where its heap has no
    hole that is large enough: exact figures.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.zeros(1))

    def setup(self, stage):
        with phase("load"):
            self.weight = nn.Parameter(torch.ones(10 * MIB))
            self.register_buffer("frozen", torch.ones(10 * MIB))

    def training_step(self, batch, batch_idx):
        with phase("step"):
            activations = torch.ones(40 * MIB)
            return (self.weight * activations[: 10 * MIB]).sum() * batch.sum()

    def on_train_batch_end(self, *args):
        self.weight.grad = None  # gone before any phase ends
        if self.global_step == 4:
            with phase("save"):
                block(100)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1, momentum=0.9)


def numbers(count: int = 8):
    return torch.utils.data.DataLoader(torch.ones(count))


def fit_heavy(folder: str) -> None:
    """Eight steps of `Heavy`, measured."""
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=8, callbacks=[MemoryProfiler(interval=0.001)], default_root_dir=folder, **settings).fit(
        Heavy(), numbers()
    )


def test_every_phase_of_a_run_is_measured_and_split(tmp_path):
    # In a process of its own: where others left a hole in the heap, large tensors are laid there and stay resident.
    script = "import sys; from tests.callbacks.test_memory_profiler import fit_heavy; fit_heavy(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    memory = read(tmp_path)
    assert list(memory["phases"]) == ["load", "step", "save"]
    assert set(memory) >= {"device", "phases", "peak_bytes", "peak_phase"}
    assert memory["device"] == "cpu"
    load, step, save = (memory["phases"][name] for name in ("load", "step", "save"))
    for figures in (load, step, save):
        assert sum(figures["breakdown"].values()) == figures["peak_bytes"] == figures["allocated_peak"]
        # less where the tensors found room in what the process already held
        assert figures["process_peak"] <= figures["peak_bytes"] + memory["baseline_bytes"]
    assert step["process_peak"] == step["peak_bytes"] + memory["baseline_bytes"]
    assert load["breakdown"] == dict.fromkeys(KINDS, 0) | {
        "weights": 80 * MIB + 4,
        "activations": 0,
        "other": load["peak_bytes"] - 80 * MIB - 4,
    }
    assert step["breakdown"]["weights"] == 80 * MIB + 4
    assert step["breakdown"]["gradients"] == 40 * MIB
    assert step["breakdown"]["optimizer"] == 40 * MIB
    # Forward: 160 and the product's 40 beside weights and momentum; backward: 160 and the gradient's 40, perhaps twice.
    assert 318 * MIB <= step["peak_bytes"] <= 375 * MIB
    assert 158 * MIB <= step["breakdown"]["activations"] <= 215 * MIB
    assert 98 * MIB <= save["breakdown"]["other"] <= 125 * MIB
    assert memory["peak_phase"] == "step"
    assert memory["peak_bytes"] == max(figures["peak_bytes"] for figures in (load, step, save))


@pytest.mark.parametrize("interval", [0, -1.0, float("nan")])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(UserError, match="memory.interval is .*seconds above 0"):
        MemoryProfiler(interval)


def test_the_picture_is_drawn(trainer_of, tmp_path):
    trainer_of(MemoryProfiler(), max_steps=1).fit(Heavy(), numbers())
    with Image.open(RunFolder(tmp_path).memory_png) as picture:
        assert picture.width > 800
        shown = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    breakdowns = [figures["breakdown"] for figures in read(tmp_path)["phases"].values()]
    held = {part for breakdown in breakdowns for part, size in breakdown.items() if size}
    assert held >= {"weights", "gradients", "optimizer", "activations"}
    assert {part for part in plots.PARTS if ImageColor.getrgb(plots.COLORS[part]) in shown} == held


def test_a_run_stopped_by_an_error_still_tells_and_stops_measuring(module, data, trainer_of, tmp_path):
    module.fail_at = 3
    before = list(phases.observers)
    with pytest.raises(RuntimeError):
        trainer_of(MemoryProfiler()).fit(module, data)
    assert "step" in read(tmp_path)["phases"]
    assert phases.observers == before


def test_fitting_twice_measures_twice(module, data, trainer_of, tmp_path):
    profiler = MemoryProfiler()
    trainer_of(profiler).fit(module, data)
    RunFolder(tmp_path).memory_json.unlink()
    trainer_of(profiler).fit(type(module)(), data)
    assert "step" in read(tmp_path)["phases"]
    assert profiler not in phases.observers


def test_a_step_costs_nothing_after_the_first_few(trainer_of, monkeypatch):
    """Nothing is counted, read or cut per step: as many calls in 60 steps as in 20."""
    calls = []
    for owner, name in ((MemoryMeter, "_cut"), (MemoryMeter, "note")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, f=original, n=name: (calls.append(n), f(self))[1])
    totals = []
    for steps in (20, 60):
        calls.clear()
        trainer_of(MemoryProfiler(interval=3600), max_steps=steps).fit(Tiny(), numbers(100))
        totals.append(len(calls))
    assert totals[0] == totals[1] <= 12


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        with phase("step"):
            return (self.weight * batch).sum()

    def validation_step(self, batch, batch_idx):
        block(60)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def test_validation_is_not_charged_to_the_step(trainer_of, tmp_path):
    trainer = trainer_of(MemoryProfiler(interval=0.001), max_steps=4, val_check_interval=4, num_sanity_val_steps=0)
    trainer.fit(Tiny(), numbers(4), numbers(1))
    memory = read(tmp_path)
    assert memory["phases"]["step"]["peak_bytes"] < 50 * MIB
    assert memory["process_peak"] - memory["baseline_bytes"] > 58 * MIB  # the process did need it


class Sampler(Callback):
    """Needs 80 MiB after every second batch."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % 2 == 0:
            with phase("sample"):
                block(80)


@pytest.mark.parametrize("profiler_first", [True, False])
def test_sampling_between_steps_is_sampling_whatever_the_order_of_callbacks(trainer_of, tmp_path, profiler_first):
    callbacks = [MemoryProfiler(interval=0.001), Sampler()]
    trainer_of(*callbacks if profiler_first else callbacks[::-1], max_steps=6).fit(Tiny(), numbers())
    figures = read(tmp_path)["phases"]
    assert figures["sample"]["peak_bytes"] >= 78 * MIB
    assert figures["step"]["peak_bytes"] < 60 * MIB


class LoadsLate(Tiny):
    """Gives the base that it loads its place only after the phase, as PersonalizationModule does."""

    def setup(self, stage):
        with phase("load"):
            base = Base()
            base.unet = nn.Linear(4 * MIB, 5, bias=False)
        self.base = base


def test_weights_that_found_their_owner_after_loading_are_weights_of_loading(trainer_of, tmp_path):
    trainer_of(MemoryProfiler(), max_steps=1).fit(LoadsLate(), numbers())
    load = read(tmp_path)["phases"]["load"]
    # weights are no more than what the process grew by, and a long-lived worker frees up to a MiB meanwhile
    assert load["breakdown"]["weights"] >= 79 * MIB
    assert sum(load["breakdown"].values()) == load["peak_bytes"]


def figures(device="cpu", **phases):
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "other"), 0)
    peaks = {name: {"peak_bytes": size, "breakdown": parts} for name, size in phases.items()}
    top = max(phases, key=phases.get)
    whole = {"peak_bytes": phases[top], "peak_phase": top, "process_peak": 2 * phases[top], "baseline_bytes": len(top)}
    return {"device": device, "phases": peaks} | whole


def test_a_resumed_run_keeps_what_an_earlier_session_took(tmp_path):
    path = tmp_path / "memory.json"
    now = figures(load=3, step=7)
    assert with_earlier(now, path) == now
    for text in ("{", "[]", "{}", '{"device": "cpu", "phases": {"step": 1}}'):  # damaged
        path.write_text(text)
        assert with_earlier(now, path) == now
    path.write_text(json.dumps(figures(precompute=9, load=4, step=5)))
    found = with_earlier(now, path)
    assert {name: phase["peak_bytes"] for name, phase in found["phases"].items()} == {
        "precompute": 9,
        "load": 4,
        "step": 7,
    }
    assert (found["peak_bytes"], found["peak_phase"], found["process_peak"]) == (9, "precompute", 18)
    path.write_text(json.dumps(figures("NVIDIA H200", step=99)))
    assert with_earlier(now, path) == now  # of another device


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"step": 80, "subjects": 8}, {"load": 3, "step": 10}, 8),
        ({"step": 80, "subjects": 8}, {"load": 3, "step": 20, "subjects": 2}, 8),
        ({"load": 99, "step": 10}, {"step": 80, "subjects": 8}, 8),
        ({"load": 99, "subjects": 8}, {"step": 10}, None),
        ({"step": 80}, {"step": 20, "subjects": 2}, None),
    ],
)
def test_how_many_trained_together_is_told_of_the_session_whose_steps_are_kept(tmp_path, before, now, expected):
    def session(subjects=None, **phases):
        return figures(**phases) | ({} if subjects is None else {"subjects": subjects})

    path = tmp_path / "memory.json"
    path.write_text(json.dumps(session(**before)))
    assert with_earlier(session(**now), path).get("subjects") == expected


def test_only_a_fit_from_a_checkpoint_goes_on_with_earlier_figures(module, data, trainer_of, tmp_path):
    run = RunFolder(tmp_path)
    first = trainer_of(MemoryProfiler(), max_steps=1)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    for checkpoint, kept in ((tmp_path / "one.ckpt", True), (None, False)):
        write_atomically(run.memory_json, json.dumps(figures(precompute=9)))
        settings = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}
        trainer_of(MemoryProfiler(), max_steps=2).fit(type(module)(), data, **settings)
        assert ("precompute" in read(tmp_path)["phases"]) is kept
