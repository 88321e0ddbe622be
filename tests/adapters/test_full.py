"""Full fine-tuning: the U-Net's own weights, exported in diffusers' layout."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import FullUNet
from mep_lightning.bases import load_base
from mep_lightning.callbacks import PriorPreservation
from mep_lightning.draws import Draw
from mep_lightning.errors import UserError
from mep_lightning.estimators.perturbation import HERE

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def conditions():
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 16, 16, generator=g), torch.tensor([400]), torch.randn(1, 77, 128, generator=g)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    module = PersonalizationModule("tiny", adapter=FullUNet(), seed=3)
    prior = PriorPreservation(images=3, weight=0.5)
    trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[prior], default_root_dir=folder, **QUIET)
    data = SubjectData()
    trainer.fit(module, data)
    return module, data, folder


def test_every_weight_is_trained(trained):
    module, _, _ = trained
    plain = load_base("tiny", vae=False).unet
    assert module.method == "dreambooth"
    moved = [not torch.equal(a, b) for a, b in zip(module.base.unet.parameters(), plain.parameters(), strict=True)]
    assert len(moved) == len(module.adapter.numbered()) and all(moved)


def test_diffusers_reads_what_is_exported(trained, tmp_path):
    module, _, _ = trained
    (path,) = module.adapter.export(tmp_path)
    assert path == tmp_path / "unet/diffusion_pytorch_model.safetensors"
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(*conditions()).sample, module.base.unet(*conditions()).sample, rtol=1e-4, atol=1e-5
        )
    other = FullUNet()
    other.load_export(tmp_path)
    base = load_base("tiny", vae=False)
    other.attach(base, other.origin["class_word"])
    assert other.origin == {"base": "tiny", "precision": "fp32", "class_word": "ball"}
    with torch.no_grad():
        assert torch.equal(base.unet(*conditions()).sample, module.base.unet(*conditions()).sample)


def test_the_class_is_trained_on_beside_the_subject(trained):
    """Prior preservation: as many pictures as asked for, drawn once, each with the class's own prompt."""
    module, data, folder = trained
    assert sorted(path.name for path in (folder / "prior").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    batch = data.batch(7)
    assert batch["priors"] == 1 and len(batch["prompts"]) == 2 and batch["mean"].shape[0] == 2
    assert batch["prompts"][1] == "a photo of a ball" and "{}" in batch["prompts"][0]
    rows = {data.batch(step)["rows"][1] for step in range(40)}
    assert rows == {5, 6, 7}  # beyond the five photos
    draw = module.draw_at(batch, 7)
    parts = [(draw.noisy[i : i + 1], draw.timestep[i : i + 1], draw.target[i : i + 1]) for i in (0, 1)]
    own, prior = (module.losses(HERE, Draw(*part, [text])) for part, text in zip(parts, draw.prompts, strict=True))
    torch.testing.assert_close(module.losses(HERE, draw), own + 0.5 * prior, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_packed_or_rounded_weights_are_refused(precision):
    base = load_base("tiny", precision, vae=False)
    with pytest.raises(UserError, match=f"these are {precision} with offload none: take precision fp32"):
        FullUNet().attach(base)


def test_weights_of_another_unet_are_refused():
    adapter = FullUNet()
    adapter.weights["conv_in/weight"] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="of another U-Net than tiny's"):
        adapter.attach(load_base("tiny", vae=False))


@pytest.mark.parametrize(("settings", "message"), [({"images": 0}, "images is 0"), ({"weight": -1}, "weight is -1")])
def test_prior_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PriorPreservation(**settings)
