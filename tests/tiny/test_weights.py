"""The embedded base as it ships: its layout, its size, and that it can carry the world."""

import json
from itertools import combinations

import pytest
import torch
from safetensors import safe_open

from benchmarks.studies.tiny import captioned, identity_margin, top1
from mep_lightning.bases import encode_prompts, predict_noise
from mep_lightning.bases.tokens import token_ids
from mep_lightning.evaluation import ClipEncoder, DinoEncoder, generate
from mep_lightning.tiny import BASE, CLIP, DINO, WEIGHTS, sample_photos
from mep_lightning.tiny.names import NAMES, looks
from mep_lightning.tiny.subjects import to_pil
from mep_lightning.tiny.train.text import vocabulary_words
from mep_lightning.tiny.train.vae import psnr
from mep_lightning.tiny.world import CLASSES, IDENTITY, random_scenes, render


def test_everything_together_is_under_40_mb():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 40e6


def test_diffusers_loads_it_as_a_stable_diffusion_pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red ball", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_weights_are_half_precision_safetensors_with_the_keys_older_readers_want():
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert all(tensors.get_tensor(key).dtype in (torch.float16, torch.int64) for key in tensors.keys())  # noqa: SIM118
    with safe_open(BASE / "text_encoder" / "model.safetensors", "pt") as tensors:
        assert all(key.startswith("text_model.") for key in tensors.keys())  # noqa: SIM118


def test_every_word_of_the_world_is_one_token(tiny_base):
    tokenizer = tiny_base.tokenizers[0]
    for word in vocabulary_words():
        assert len(tokenizer(word).input_ids) == 3, word
    assert json.loads((BASE / "text_encoder/config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id != 2
    assert (token_ids(tokenizer, ["a red ball"])[0] == tokenizer.eos_token_id).sum() == 32 - 4  # padded as SD1.5 does


def test_the_autoencoder_carries_unseen_scenes(tiny_base):
    images = render(random_scenes(64, torch.Generator().manual_seed(29_999))[0]) * 2 - 1
    with torch.no_grad(), tiny_base.borrowed_vae() as vae:
        latents = vae.encode(images).latent_dist.mean
        assert psnr(vae.decode(latents).sample, images) > 26
    assert 0.9 < (latents * tiny_base.scaling_factor).std() < 1.1


def test_metric_encoders_are_there():
    for folder in (CLIP, DINO):
        assert {f.name for f in folder.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_sample_photos_show_one_subject_in_five_places():
    photos, class_word = sample_photos()
    assert class_word == "ball" and len(photos) == 5
    assert all(photo.size == (64, 64) and photo.mode == "RGB" for _, photo in photos)
    backgrounds = [photo.resize((1, 1), box=(0, 0, 64, 6)).getpixel((0, 0)) for _, photo in photos]
    assert all(max(abs(x - y) for x, y in zip(a, b, strict=True)) > 8 for a, b in combinations(backgrounds, 2))
    features = DinoEncoder(DINO).encode_images([photo for _, photo in photos])
    assert (features @ features.T).min() > 0.7  # kin of other subjects stay below, see the test of the encoder


@pytest.mark.slow
def test_samples_follow_their_captions(tiny_base):
    """Of 32 unseen captions, the metric CLIP finds most of their own pictures, rendered or drawn by the base."""
    captions, images = captioned(50)
    clip = ClipEncoder(CLIP)
    assert top1(clip, captions, to_pil(images)) >= 0.9
    pictures = generate(tiny_base, captions, [0] * len(captions), steps=20, guidance=3.0, batch_size=16)
    assert top1(clip, captions, pictures) >= 0.75


def test_a_name_means_its_own_look(tiny_base):
    """Scenes of names' looks are denoised better with their own names than with another's."""
    count = 32
    views, _ = random_scenes(count, torch.Generator().manual_seed(29_998))
    own = {field: getattr(looks(), field)[:count] for field in IDENTITY if field != "kind"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), tiny_base.borrowed_vae() as vae:
        latents = vae.encode(render(views.replace(**own)) * 2 - 1).latent_dist.mean * tiny_base.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.linspace(50, 600, count).long()
        noisy = tiny_base.scheduler.add_noise(latents, noise, timestep)
        errors = []
        for names in (NAMES[:count], NAMES[count : 2 * count]):
            captions = [f"a {name} {CLASSES[kind]}" for name, kind in zip(names, views.kind, strict=True)]
            predicted = predict_noise(tiny_base.unet, noisy, timestep, encode_prompts(tiny_base, captions))
            errors.append((predicted - noise).pow(2).mean((1, 2, 3)))
    assert (errors[0] < errors[1]).float().mean() > 0.8


def test_the_dino_encoder_tells_subjects_of_one_class_apart():
    same, kin = identity_margin(DinoEncoder(DINO))
    assert same > 0.7 > 0.4 > kin
