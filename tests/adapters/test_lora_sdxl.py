"""LoRA on SDXL's build: its U-Net is told of pooled text and sizes, and has transformers of several blocks."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenAndLoRA, TokenEmbedding
from mep_lightning.bases import condition_on, load_base, predict_noise
from mep_lightning.bases.units import cuts, line
from mep_lightning.bases.walk import activation_at
from mep_lightning.callbacks import HollowedActivations
from mep_lightning.estimators import Backprop, SPSAEstimator
from mep_lightning.evaluation import generate
from tests.sdxl import SIDE

PROMPT = "a photo of a sks ball"


def fitted(folder, photos, root, callbacks=(), **settings):
    settings = {"adapter": LoRA(rank=2), "lr": 0.05} | settings
    module = PersonalizationModule(str(folder), **settings)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(max_steps=3, accelerator="cpu", callbacks=list(callbacks), default_root_dir=root, **quiet)
    trainer.fit(module, SubjectData(photos, class_word="ball", resolution=SIDE))
    return module


def conditions(base, prompt=PROMPT):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([400]), condition_on(base, [prompt])


@pytest.mark.parametrize("estimator", [Backprop, SPSAEstimator])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_trained_means_the_same_to_diffusers(sdxl_folder, photo_folder, tmp_path, precision, estimator):
    settings = {} if estimator is Backprop else {"estimator": SPSAEstimator(n=2, mu=1e-3)}
    module = fitted(sdxl_folder, photo_folder, tmp_path, precision=precision, **settings)
    base = load_base(sdxl_folder, vae=False)
    start = predict_noise(base.unet, *conditions(base)).detach()
    paths = module.adapter.export(tmp_path / "adapter")
    again = LoRA()
    again.load_export(tmp_path / "adapter")
    again.attach(base, "ball")
    with torch.no_grad():
        ours = predict_noise(base.unet, *conditions(base))
    assert (ours - start).abs().max() > 1e-3
    again.detach()
    for path in paths:
        pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        base.unet = pipe.unet
        with torch.no_grad():
            theirs = predict_noise(base.unet, *conditions(base))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_hollowed_forward_without_a_lora_is_the_full_one(sdxl_folder, precision):
    base = load_base(sdxl_folder, precision, vae=False)
    given = conditions(base)
    with torch.no_grad():
        whole = predict_noise(base.unet, *given)
        assert (whole - predict_noise(base.unet, *conditions(base, "grass"))).abs().max() > 1e-4
        for cut in cuts(base.unet):
            activation = activation_at(base.unet, *given, cut)
            base.free([unit.module for unit in line(base.unet)[cut.start : cut.stop]])
            around = predict_noise(base.unet, *given, cut=cut, activation=activation)
            torch.testing.assert_close(around, whole, rtol=1e-5, atol=1e-6)
            base.read_unet(base.freed)
            base.freed = []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_hollowed_run_trains_and_draws_along_two_paths(sdxl_folder, photo_folder, tmp_path, precision):
    fraction = cuts(load_base(sdxl_folder, vae=False).unet)[0].fraction
    hollowed = HollowedActivations(fraction, samples=2)
    module = fitted(sdxl_folder, photo_folder, tmp_path, [hollowed], precision=precision, method="hollowed_net")
    assert all(value.is_meta for part in module.hollow.inside(module.base) for value in part.parameters())
    assert all((up != 0).any() for up in module.adapter.up.values())
    (two,) = generate(module, [PROMPT], [0], steps=2, resolution=SIDE)
    with module.adapter.away():
        (plain,) = generate(module, [PROMPT], [0], steps=2, resolution=SIDE)
    assert list(two.getdata()) != list(plain.getdata())


def test_a_token_and_a_lora_train_together(sdxl_folder, photo_folder, tmp_path):
    adapter = TokenAndLoRA(TokenEmbedding(init="ball"), LoRA(rank=2))
    module = fitted(sdxl_folder, photo_folder, tmp_path, adapter=adapter, precision="int8")
    start = TokenEmbedding(init="ball")
    start.attach(module.base)
    assert (adapter.word.theta != start.theta).all()
    assert all((up != 0).any() for up in adapter.lora.up.values())
