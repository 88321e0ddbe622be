"""Bases without their weights: the sizes of the public ones, and just what `load_base` would hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mep_lightning.bases import load_base
from mep_lightning.bases.families import describe
from mep_lightning.bases.skeleton import ARCHITECTURES, architecture, skeleton
from mep_lightning.errors import UserError


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# The counts of the published checkpoints.
@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840), ("sdxl", 2_567_463_684, 123_060_480)],
)
def test_packaged_architectures_have_the_published_sizes(name, unet, text):
    with FakeTensorMode():
        base = skeleton(name, "fp16")
    second = [694_659_840] if name == "sdxl" else []
    assert [parameters(part) for part in base.modules()] == [unet, text, *second, 83_653_863]
    assert base.tokenizers[0].model_max_length == 77


@pytest.mark.parametrize(
    ("name", "family", "resolution", "prediction"),
    [("sd15", "sd1", 512, "epsilon"), ("sd21", "sd2", 768, "v_prediction"), ("sdxl", "sdxl", 1024, "epsilon")],
)
def test_packaged_architectures_are_recognised(name, family, resolution, prediction):
    info = describe(architecture(name), name)
    assert (info.family, info.resolution, info.vae_factor, info.prediction) == (family, resolution, 8, prediction)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_skeleton_holds_what_the_loaded_base_holds(precision):
    if precision == "int4":
        pytest.importorskip("bitsandbytes")
    real, made = load_base("tiny", precision), skeleton("tiny", precision)
    assert (made.dtype, made.info, made.resolution) == (real.dtype, real.info, real.resolution)
    for theirs, ours in zip(real.modules(), made.modules(), strict=True):
        expected = {name: (value.shape, value.dtype) for name, value in theirs.state_dict().items()}
        assert {name: (value.shape, value.dtype) for name, value in ours.state_dict().items()} == expected
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_weights_are_made_by_name_and_shape():
    base = skeleton("tiny", "fp32", make=lambda name, shape: torch.full(shape, float(len(shape))))
    assert base.unet.conv_in.weight.eq(4).all() and base.unet.conv_in.bias.eq(1).all()


def test_a_skeleton_can_be_all_fake():
    with FakeTensorMode():
        base = skeleton("sd15", "int8")
        latents, times, text = torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768)
        assert base.unet(latents, times, text).sample.shape == (2, 4, 64, 64)
    assert all(isinstance(p, FakeTensor) for part in base.modules() for p in part.parameters())


def test_an_unknown_architecture_is_one_sentence():
    assert {path.name for path in ARCHITECTURES.iterdir()} == {"sd15", "sd21", "sdxl"}
    with pytest.raises(UserError, match="'sd16' is no folder"):
        architecture("sd16")
