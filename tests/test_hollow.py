"""Hollowed Net: around a hollow everything is computed as if it were there, and it is not."""

import json
import os

import pytest
import torch
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.bases import load_base, predict_noise
from mep_lightning.bases.units import cuts, line
from mep_lightning.bases.walk import activation_at
from mep_lightning.callbacks import HollowedActivations
from mep_lightning.errors import UserError
from mep_lightning.evaluation import generate
from mep_lightning.hollow import Hollow, nearest_cut

SAMPLES = 5
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def fitted(folder, steps=3, precision="fp32", callback=None, module=None, **settings):
    module = module or PersonalizationModule("tiny", precision, adapter=LoRA(rank=4), method="hollowed_net", **settings)
    callback = callback or HollowedActivations(0.43, SAMPLES)
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, SubjectData())
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hollow")
    return fitted(folder), folder


def conditions(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, 16, 16, generator=g), torch.tensor([400]), torch.randn(1, 77, 128, generator=g)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_a_lora_the_hollowed_forward_is_the_full_one(precision):
    base = load_base("tiny", precision, vae=False)
    told = conditions()
    with torch.no_grad():
        whole = base.unet(*told).sample
        for cut in cuts(base.unet):
            activation = activation_at(base.unet, *told, cut)
            base.free([unit.module for unit in line(base.unet)[cut.start : cut.stop]])
            around = predict_noise(base.unet, *told, cut=cut, activation=activation)
            torch.testing.assert_close(around, whole, rtol=1e-5, atol=1e-6)
            with base.whole():
                pass
            base.read_unet(base.freed)
            base.freed = []


def test_gradients_are_those_of_a_full_unet_whose_middle_is_frozen_and_fed_the_stored_input():
    base = load_base("tiny", vae=False)
    cut = nearest_cut(cuts(base.unet), 0.43)
    units = line(base.unet)
    inside, after = units[cut.start : cut.stop], units[cut.stop].module
    adapter = LoRA(rank=4)
    adapter.attach(base, without=[unit.module for unit in inside])
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_(std=0.1, generator=torch.Generator().manual_seed(up.numel()))
    told = conditions()
    with torch.no_grad(), adapter.away():
        stored = activation_at(base.unet, *told, cut)
    parameters = list(adapter.numbered().values())
    ours = torch.autograd.grad(
        predict_noise(base.unet, *told, cut=cut, activation=stored).square().sum(), parameters, allow_unused=True
    )
    # The whole U-Net runs, and what its middle hands on is the stored tensor.
    handle = after.register_forward_pre_hook(
        lambda _, given: (torch.cat([stored, given[0][:, stored.shape[1] :]], 1), *given[1:])
    )
    theirs = torch.autograd.grad(base.unet(*told).sample.square().sum(), parameters, allow_unused=True)
    handle.remove()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_training_frees_the_hollow_and_goes_round_the_draws(trained):
    module, folder = trained
    inside = module.hollow.inside(module.base)
    assert all(value.is_meta for part in inside for value in (*part.parameters(), *part.buffers()))
    assert not any(value.is_meta for value in module.adapter.parameters())
    assert module.hollow.stored.shape[0] == SAMPLES
    for start in (0, SAMPLES):  # every draw once a round
        assert sorted(module.hollow.index(0, start + k) for k in range(SAMPLES)) == list(range(SAMPLES))
    names = {name for name, _ in module.adapter.named_parameters()}
    assert names and not any("mid_block" in name for name in names)
    assert (folder / "activations" / "activations.bin").stat().st_size == module.hollow.stored.nbytes


def test_a_stored_activation_is_what_the_original_unet_answers(trained):
    module, _ = trained
    base = load_base("tiny", vae=False)
    index = module.hollow.index(module.seed, 3)
    data = SubjectData()
    data.default_seed = module.seed
    data.encode(load_base("tiny"))
    draw = module.draw_at(data.batch(index), index)
    told = module.condition_on(draw.prompts)
    with torch.no_grad():
        expected = activation_at(base.unet, draw.noisy, draw.timestep, told, module.hollow.cut)
    torch.testing.assert_close(module.hollow.activation(index), expected, rtol=1e-5, atol=1e-6)


def test_pictures_take_two_paths_and_the_hollow_is_gone_again(trained):
    module, _ = trained
    with torch.no_grad():
        for up in module.adapter.up.values():
            up.normal_(std=0.3, generator=torch.Generator().manual_seed(up.numel()))
    (two,) = generate(module, ["a photo of a sks ball"], [0], steps=2, guidance=1.0)
    assert module.base.freed and next(module.base.freed[0].parameters()).is_meta
    hollow, module.hollow = module.hollow, None
    with module.base.whole():
        (one,) = generate(module, ["a photo of a sks ball"], [0], steps=2, guidance=1.0)
    module.hollow = hollow
    assert list(two.getdata()) != list(one.getdata())
    assert "forward" not in vars(module.base.unet)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_activations_are_stored_bit_by_bit(tmp_path, precision):
    module = fitted(tmp_path, steps=1, precision=precision)
    draw = module.draw_at(module.trainer.datamodule.batch(2), 2)
    with module.base.whole():
        expected = module.hollow.answer(module, draw)
    assert expected.dtype == module.base.dtype and torch.equal(module.hollow.activation(2), expected)


class Killed(Exception):
    """As if the process had died."""


def test_stage_1_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    answer, asked = Hollow.answer, []

    def counting(self, module, draw, dies_at=None):
        asked.append(1)
        if len(asked) == dies_at:
            raise Killed
        return answer(self, module, draw)

    monkeypatch.setattr("mep_lightning.hollow.EVERY", 1)
    monkeypatch.setattr(Hollow, "answer", lambda *given: counting(*given, dies_at=4))
    with pytest.raises(Killed):
        fitted(tmp_path)
    assert json.loads((tmp_path / "activations" / "activations.json").read_text())["done"] == 2
    asked.clear()
    monkeypatch.setattr(Hollow, "answer", counting)
    again = fitted(tmp_path)
    assert len(asked) == 1 + SAMPLES - 2  # one to learn the shape
    monkeypatch.setattr(Hollow, "answer", answer)
    whole = fitted(tmp_path / "whole")
    assert (again.hollow.stored == whole.hollow.stored).all()
    for mine, other in zip(again.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_a_file_made_anew_counts_from_its_first_draw(tmp_path, trained, monkeypatch, left):
    """Killed between the new file, which is full of zeros, and the first note of what it holds."""
    answer, asked, path = Hollow.answer, [], tmp_path / "activations" / "activations.bin"

    def dying(self, module, draw):
        asked.append(1)
        if len(asked) == 2:  # the first tells the shape
            raise Killed
        return answer(self, module, draw)

    fitted(tmp_path)
    path.unlink() if left == "nothing" else os.truncate(path, path.stat().st_size // 2)
    monkeypatch.setattr(Hollow, "answer", dying)
    with pytest.raises(Killed):
        fitted(tmp_path)
    monkeypatch.setattr(Hollow, "answer", answer)
    assert (fitted(tmp_path).hollow.stored == trained[0].hollow.stored).all()


def test_a_folder_that_another_run_makes_ready_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("mep_lightning.hollow.PATIENCE", 0)
    folder, other = tmp_path / "activations", Hollow.answer

    def interrupted(self, module, draw):
        if (folder / "activations.bin").is_file():
            monkeypatch.setattr(Hollow, "answer", other)
            theirs = (folder / "activations.bin").stat().st_ino
            with pytest.raises(UserError, match="another run makes activations in .*: wait until it trains, or name"):
                fitted(tmp_path, steps=1)
            assert (folder / "activations.bin").stat().st_ino == theirs
        return other(self, module, draw)

    monkeypatch.setattr(Hollow, "answer", interrupted)
    first = fitted(tmp_path, steps=1)
    assert Hollow.answer is other  # the second came while the first was at it
    assert (fitted(tmp_path, steps=1).hollow.stored == first.hollow.stored).all()  # and may come again


def test_activations_of_another_run_are_refused(tmp_path):
    fitted(tmp_path, steps=1)
    fitted(tmp_path, steps=1)  # the same: read again
    with pytest.raises(UserError, match="another base, precision, cut, number of samples, .* or seed"):
        fitted(tmp_path, steps=1, seed=1)
    with pytest.raises(UserError, match="holds activations of another base"):
        fitted(tmp_path, steps=1, precision="int8")
    word = PersonalizationModule("tiny", adapter=LoRA("zwx", rank=4), method="hollowed_net")
    with pytest.raises(UserError, match="holds activations of another base"):  # its prompts name another subject
        fitted(tmp_path, steps=1, module=word)
    (tmp_path / "activations" / "activations.bin").unlink()  # as the message says
    fitted(tmp_path, steps=1, seed=1)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            HollowedActivations(0.7, SAMPLES),
            "down_blocks.2.resnets.0 to up_blocks.0.resnets.0 on 5 .* not around down_bl",
        ),
        (HollowedActivations(0.43, 3), "resnets.0 on 5 samples, not around .* on 3 samples: set HollowedActivations"),
        (None, "not without a hollow"),
    ],
)
def test_a_checkpoint_of_another_hollow_is_refused(trained, tmp_path, callback, message):
    module, folder = trained
    module.trainer.save_checkpoint(folder / "three.ckpt")
    other = PersonalizationModule("tiny", adapter=LoRA(rank=4), method="hollowed_net")
    given = [callback] if callback else []
    trainer = Trainer(max_steps=4, accelerator="cpu", callbacks=given, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(UserError, match=message):
        trainer.fit(other, SubjectData(), ckpt_path=folder / "three.ckpt", weights_only=True)


def test_too_small_a_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"stage 1 of Hollowed Net writes .* and 0.977 KiB are free there: make room"):
        fitted(tmp_path)
    assert not (tmp_path / "activations" / "activations.bin").exists()


def test_a_fraction_without_a_cut_names_the_nearest():
    found = cuts(load_base("tiny", vae=False).unet)
    assert nearest_cut(found, 0.39).fraction == pytest.approx(0.43, abs=1e-3)
    with pytest.raises(UserError, match=r"fraction is 0.3, and no cut is near: the nearest are 0.202 and 0.430"):
        nearest_cut(found, 0.3)
    with pytest.raises(UserError, match=r"fraction is 0.01, and no cut is near: the nearest are 0.202\."):
        nearest_cut(found, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, "HollowedActivations.fraction is 1.5; use a share between 0 and 1, or auto"),
        ({"samples": 0}, "HollowedActivations.samples is 0; use 1 or more, or auto"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        HollowedActivations(**settings)


def test_a_module_that_trains_no_lora_is_refused(tmp_path):
    module = PersonalizationModule("tiny", adapter=TokenEmbedding())
    with pytest.raises(UserError, match="HollowedActivations needs a module that trains a LoRA"):
        fitted(tmp_path, module=module)


def test_a_fit_without_the_callback_does_not_go_round_an_earlier_fits_draws(tmp_path):
    module = fitted(tmp_path / "first")
    trainer = Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path / "second", **QUIET)
    with pytest.raises(UserError, match="its activations are of that fit: fit it with HollowedActivations again"):
        trainer.fit(module, SubjectData())
    fitted(tmp_path / "third", steps=1, module=module)
