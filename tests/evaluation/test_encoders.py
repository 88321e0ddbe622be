"""Preprocessing against an independent computation, and the encoders against transformers' own calls."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mep_lightning.errors import UserError
from mep_lightning.evaluation.encoders import ClipEncoder, DinoEncoder
from mep_lightning.tiny import CLIP, DINO

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, so that filters and places both matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([np.sin(9 * x + seed), np.cos(7 * y), np.sin(5 * (x + y))], -1) * 90 + 128
    return Image.fromarray((waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8))


def resample_axis(pixels: np.ndarray, size: int, cubic: bool) -> np.ndarray:
    """Antialiased resampling along axis 0, from the definition: a kernel stretched by the scale, edges renormalised."""
    length = pixels.shape[0]
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    out = np.zeros((size, *pixels.shape[1:]))
    for i in range(size):
        center = (i + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        distance = np.abs((np.arange(first, last) + 0.5 - center) / stretch)
        if cubic:  # Keys' kernel with a = -1/2
            weights = np.where(
                distance < 1,
                1.5 * distance**3 - 2.5 * distance**2 + 1,
                np.where(distance < 2, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2, 0),
            )
        else:
            weights = np.clip(1 - distance, 0, None)
        out[i] = np.tensordot(weights / weights.sum(), pixels[first:last], 1)
    return np.clip(np.floor(out + 0.5), 0, 255)  # 8 bits after each pass


def resize(image: Image.Image, width: int, height: int, cubic: bool) -> np.ndarray:
    """[height, width, 3]"""
    pixels = np.asarray(image, dtype=np.float64)
    pixels = resample_axis(pixels.swapaxes(0, 1), width, cubic).swapaxes(0, 1)
    return resample_axis(pixels, height, cubic)


@pytest.mark.parametrize(("width", "height"), [(50, 37), (37, 50), (20, 20), (24, 24)])
def test_clip_preprocessing_is_shortest_edge_bicubic_then_centre_crop_then_normalise(clip_folder, width, height):
    image = picture(width, height)
    if width < height:
        resized = resize(image, 24, int(24 * height / width), cubic=True)
    else:
        resized = resize(image, int(24 * width / height), 24, cubic=True)
    top, left = (resized.shape[0] - 24) // 2, (resized.shape[1] - 24) // 2
    cropped = resized[top : top + 24, left : left + 24]
    expected = (cropped / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    actual = ClipEncoder(clip_folder).preprocess([image])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, atol=1.01 / 255 / min(CLIP_STD))  # one grey level of rounding
    assert np.abs(actual - expected).mean() < 0.02 / 255 / min(CLIP_STD)


def test_dino_preprocessing_takes_the_central_square_bilinearly(dino_folder):
    image = picture(51, 33)
    expected = (resize(image.crop((9, 0, 42, 33)), 24, 24, cubic=False) / 255 - np.array(IMAGENET_MEAN)) / np.array(
        IMAGENET_STD
    )
    actual = DinoEncoder(dino_folder).preprocess([image])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, atol=1.01 / 255 / min(IMAGENET_STD))
    assert np.abs(actual - expected).mean() < 0.02 / 255 / min(IMAGENET_STD)


@pytest.mark.parametrize(("size", "square"), [((64, 64), (0, 0)), ((100, 37), (31, 0)), ((40, 300), (0, 130))])
@pytest.mark.parametrize(("encoder", "folder"), [(ClipEncoder, CLIP), (DinoEncoder, DINO)])
def test_the_embedded_encoders_see_the_central_square_at_64_pixels(encoder, folder, size, square):
    image, side = picture(*size), min(size)
    cut = image.crop((*square, square[0] + side, square[1] + side))
    expected = np.asarray(cut.resize((64, 64), Image.Resampling.BICUBIC)) / 127.5 - 1
    actual = encoder(folder).preprocess([image])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_pictures_of_other_modes_and_sizes_go_into_one_batch(dino_folder):
    encoder = DinoEncoder(dino_folder)
    images = [picture(30, 20), picture(9, 40).convert("L"), picture(24, 24).convert("RGBA"), picture(3, 3).convert("P")]
    together = encoder.preprocess(images)
    assert together.shape == (4, 3, 24, 24) and together.dtype == torch.float32
    for image, tensor in zip(images, together, strict=True):
        assert torch.equal(tensor, encoder.preprocess([image.convert("RGB")])[0])


def test_the_checkpoints_own_configuration_is_followed(clip_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(clip_folder, folder)
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": 10, "width": 10},
        "do_center_crop": False,
        "resample": 0,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 4.0],
        "rescale_factor": 0.01,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    image = picture(20, 20)
    nearest = np.asarray(image)[1::2, 1::2]  # halving with the nearest pixel
    expected = (nearest * 0.01 - np.array([0.1, 0.2, 0.3])) / np.array([1, 2, 4])
    actual = ClipEncoder(folder).preprocess([image])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_clip_embeddings_equal_the_models_own_and_have_length_one(clip_folder):
    encoder = ClipEncoder(clip_folder, batch_size=2)
    images = [picture(30, 30, seed) for seed in range(5)]
    vision = encoder.model.vision_model(pixel_values=encoder.preprocess(images)).pooler_output
    projected = encoder.model.visual_projection(vision)
    expected = projected / projected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encoder.encode_images(images), expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


def test_text_embeddings_do_not_depend_on_their_neighbours(clip_folder):
    encoder = ClipEncoder(clip_folder)
    texts = ["a red ball", "a", "a very long text that exceeds every context " * 3]
    together = encoder.encode_texts(texts)
    for number, text in enumerate(texts):
        torch.testing.assert_close(encoder.encode_texts([text])[0], together[number], atol=1e-5, rtol=1e-4)
    assert together.norm(dim=-1).allclose(torch.ones(3))


def test_dino_embeddings_are_the_class_token(dino_folder):
    encoder = DinoEncoder(dino_folder, batch_size=2)
    images = [picture(30, 30, seed) for seed in range(3)]
    token = encoder.model(pixel_values=encoder.preprocess(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode_images(images), token / token.norm(dim=-1, keepdim=True))


def test_loading_an_encoder_draws_no_random_numbers(dino_folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DinoEncoder(dino_folder)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_checkpoints_are_refused_in_a_sentence(tmp_path, clip_folder, dino_folder):
    with pytest.raises(UserError, match=f"CLIP checkpoint '{tmp_path}/nowhere'.*name a hub id.*folder holding"):
        ClipEncoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds a ViTModel, not a CLIP model"):
        ClipEncoder(dino_folder)
    with pytest.raises(UserError, match="holds a CLIPModel, not a DINO model"):
        DinoEncoder(clip_folder)


def test_pickled_weights_are_not_read(dino_folder, tmp_path):
    shutil.copy(dino_folder / "config.json", tmp_path)
    torch.save(DinoEncoder(dino_folder).model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        DinoEncoder(tmp_path)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_damaged_preprocessor_is_named(dino_folder, tmp_path, content):
    folder = tmp_path / "checkpoint"
    shutil.copytree(dino_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"the DINO checkpoint '.*' \(.*\); .* and preprocessor_config\.json\.$"):
        DinoEncoder(folder)
