"""An autoencoder in bands answers what diffusers' own does, in less memory."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from benchmarks.performance.memory import allocated_peak
from mep_lightning.bases import bands
from mep_lightning.bases.bands import BandedConv2d, BandedDownsample, BandedResnet, BandedUpsample, moments
from mep_lightning.bases.frugal import compute_frugally_
from mep_lightning.bases.streaming import Stream
from mep_lightning.kernels.stacks import is_channels_last

LAYOUTS = [torch.channels_last, torch.contiguous_format]


def small_vae(**changes):
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    vae = AutoencoderKL(**(shape | changes)).eval().requires_grad_(False)
    for norm in (part for part in vae.modules() if isinstance(part, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return vae


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels last", "channels first"])
@pytest.mark.parametrize("values", [1, 700, 5_000])
def test_the_answers_are_those_of_whole_pictures(monkeypatch, values, layout):
    vae = small_vae().double().to(memory_format=layout)
    generator = torch.Generator().manual_seed(1)
    photo = torch.randn(1, 3, 36, 44, dtype=torch.float64, generator=generator)
    latents = torch.randn(2, 4, 9, 11, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        encoded, decoded = vae.encode(photo).latent_dist.parameters, vae.decode(latents).sample
        compute_frugally_(vae)
        monkeypatch.setattr(bands, "BAND", values)
        torch.testing.assert_close(vae.encode(photo).latent_dist.parameters, encoded, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(vae.decode(latents).sample, decoded, rtol=1e-11, atol=1e-12)


def test_pictures_that_are_no_larger_than_a_band_go_through_whole():
    vae, photo = small_vae(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        encoded = vae.encode(photo).latent_dist.parameters
        compute_frugally_(vae)
        assert torch.equal(vae.encode(photo).latent_dist.parameters, encoded)


def test_streamed_weights_serve_every_band_of_a_layer_in_one_visit(monkeypatch):
    vae, latents = small_vae(), torch.randn(1, 4, 9, 11)
    compute_frugally_(vae)
    monkeypatch.setattr(bands, "BAND", 700)
    with torch.no_grad():
        decoded = vae.decode(latents).sample
        stream, visits = Stream(vae, torch.device("cpu")), []
        arrive = stream._arrive
        monkeypatch.setattr(stream, "_arrive", lambda key: (visits.append(key[0].module), arrive(key))[1])
        for _ in range(2):  # the second time the next layers are there ahead of use
            visits.clear()
            assert torch.equal(vae.decode(latents).sample, decoded)
            assert len(set(visits)) == len(visits) > 10
        stream.close()


def test_blocks_with_attention_are_left_as_they_are(monkeypatch):
    vae = small_vae(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).double()
    photo, latents = torch.randn(1, 3, 32, 32).double(), torch.randn(1, 4, 8, 8).double()
    with torch.no_grad():
        encoded, decoded = vae.encode(photo).latent_dist.parameters, vae.decode(latents).sample
        compute_frugally_(vae)
        monkeypatch.setattr(bands, "BAND", 700)
        torch.testing.assert_close(vae.encode(photo).latent_dist.parameters, encoded)
        torch.testing.assert_close(vae.decode(latents).sample, decoded)


def test_where_a_gradient_is_asked_for_everything_is_differentiable(monkeypatch):
    vae = small_vae()
    compute_frugally_(vae)
    monkeypatch.setattr(bands, "BAND", 700)
    photo = torch.randn(1, 3, 32, 32, requires_grad=True)
    vae.decode(vae.encode(photo).latent_dist.mean).sample.sum().backward()
    assert photo.grad is not None and photo.grad.abs().sum() > 0


LAYERS = {
    "same width": (ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4), BandedResnet, 8),
    "other width": (ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=None, groups=4), BandedResnet, 8),
    "upsampling": (Upsample2D(8, use_conv=True, out_channels=12), BandedUpsample, 8),
    "downsampling": (Downsample2D(8, use_conv=True, out_channels=12, padding=0), BandedDownsample, 8),
    "without a convolution": (Upsample2D(8), BandedUpsample, 8),
    "padded": (Downsample2D(8, use_conv=True, padding=1), BandedDownsample, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels last", "channels first"])
@pytest.mark.parametrize("size", [(14, 10), (15, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_its_input_its_answer_and_the_memory_format(monkeypatch, name, size, layout):
    plain, kind, channels = LAYERS[name]
    plain = plain.double().eval()
    picture = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=layout)
    before, inputs = picture.clone(), (picture, None) if isinstance(plain, ResnetBlock2D) else (picture,)
    with torch.no_grad():
        expected = plain(*inputs)
        monkeypatch.setattr(plain, "__class__", kind)
        for part in plain.modules():
            if type(part) is nn.Conv2d:
                monkeypatch.setattr(part, "__class__", BandedConv2d)
        monkeypatch.setattr(bands, "BAND", 300)
        answer = plain(*inputs)
    torch.testing.assert_close(answer, expected)
    assert torch.equal(picture, before) and is_channels_last(answer) == is_channels_last(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_are_exact_to_rounding_whatever_the_mean(monkeypatch, dtype):
    monkeypatch.setattr(bands, "BAND", 200)
    picture = (torch.randn(2, 8, 13, 9, dtype=torch.float64) + 100).to(dtype)
    mean, variance = moments(picture, 4)
    exact = picture.double().unflatten(1, (4, -1)).flatten(2)
    torch.testing.assert_close(mean, exact.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, exact.var(2, correction=0), rtol=1e-5, atol=0)


def test_a_decoder_holds_its_largest_layers_input_and_half_as_much_again(monkeypatch):
    vae, latents = small_vae(block_out_channels=(32, 64, 64)), torch.randn(1, 4, 64, 64)
    largest = 64 * 256 * 256 * 4  # what the last block begins with
    with torch.no_grad():
        whole = allocated_peak(lambda: vae.decode(latents))
        compute_frugally_(vae)
        monkeypatch.setattr(bands, "BAND", 2**17)
        banded = allocated_peak(lambda: vae.decode(latents))
    assert whole > 2.9 * largest and banded < 1.7 * largest
