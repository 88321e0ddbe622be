"""Whole models in int8: what is swapped, what stays, and whether diffusers and transformers still run them."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from mep_lightning.errors import UserError
from mep_lightning.quantization import Int8Conv2d, Int8Linear, quantize_module_


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=10, **shape)).eval()


def noise_pred(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    prompt_embeds = torch.randn(2, 5, 24, generator=generator).to(dtype)
    return model(latents, torch.tensor([10, 900]), encoder_hidden_states=prompt_embeds).sample


def float_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]


def int8_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Int8Linear | Int8Conv2d)]


@pytest.mark.parametrize("make", [unet, text_encoder])
def test_every_linear_and_convolution_is_swapped_and_nothing_else(make):
    model = make()
    kept = {name: p.clone() for name, p in model.named_parameters() if "norm" in name or "embedding.weight" in name}
    expected = len(float_layers(model))
    assert quantize_module_(model) == expected == len(int8_layers(model)) > 0
    assert not float_layers(model)
    for layer in int8_layers(model):
        assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
        assert not layer.training
    parameters = dict(model.named_parameters())
    assert kept
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())
    assert quantize_module_(model) == 0  # nothing is left to swap


@torch.no_grad()
def test_a_unet_predicts_nearly_the_same_noise():
    model = unet()
    expected = noise_pred(model)
    quantize_module_(model)
    error = (noise_pred(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@torch.no_grad()
def test_a_text_encoder_gives_nearly_the_same_embeddings():
    model, ids = text_encoder(), torch.tensor([[1, 5, 7, 49, 49]])
    expected = model(ids).last_hidden_state
    quantize_module_(model)
    error = (model(ids).last_hidden_state - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_model_keeps_its_int8_weights_and_runs_in_its_dtype(dtype):
    model, encoder = unet(), text_encoder()
    expected = noise_pred(model)
    for part in (model, encoder):
        quantize_module_(part)
        part.to(dtype)
        assert part.dtype == dtype  # what pipelines cast latents and prompts to
        assert all(layer.weight.dtype == torch.int8 for layer in int8_layers(part))
        assert all(layer.scale.dtype == torch.float32 for layer in int8_layers(part))
    predicted = noise_pred(model, dtype)
    assert predicted.dtype == dtype
    assert (predicted.float() - expected).norm() < 0.1 * expected.norm()
    assert encoder(torch.tensor([[1, 2, 49]])).last_hidden_state.dtype == dtype


@torch.no_grad()
def test_autocast_changes_the_activations_only():
    model = unet()
    expected = noise_pred(model)
    quantize_module_(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = noise_pred(model)
    assert (predicted.float() - expected).norm() < 0.1 * expected.norm()
    assert {(layer.weight.dtype, layer.scale.dtype) for layer in int8_layers(model)} == {(torch.int8, torch.float32)}


def test_gradients_reach_the_prompt():
    grads = []
    for quantize in (False, True):
        model = unet().requires_grad_(False)
        if quantize:
            quantize_module_(model)
        prompt_embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        model(latents, torch.tensor([500]), encoder_hidden_states=prompt_embeds).sample.square().mean().backward()
        grads.append(prompt_embeds.grad)
    assert torch.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.99


@torch.no_grad()
def test_state_dict_round_trip_of_a_whole_model():
    model, other = unet(), unet()
    nn.init.normal_(other.conv_in.weight)
    quantize_module_(model), quantize_module_(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(noise_pred(other), noise_pred(model))


@torch.no_grad()
def test_a_model_on_the_meta_device_quantises_what_is_loaded_into_it():
    source = unet()
    with torch.device("meta"):
        model = unet()
    quantize_module_(model)
    assert all(layer.weight.is_meta for layer in int8_layers(model))
    model.load_state_dict(source.state_dict(), assign=True)
    quantize_module_(source)
    assert torch.equal(noise_pred(model), noise_pred(source))


def test_works_under_fake_tensors():
    with FakeTensorMode():
        model = unet()
        quantize_module_(model)
        with torch.no_grad():
            predicted = noise_pred(model)
    assert (predicted.shape, predicted.dtype) == ((2, 4, 8, 8), torch.float32)
    assert {layer.weight.dtype for layer in int8_layers(model)} == {torch.int8}


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(nn.ReLU(), shared)})
    assert quantize_module_(model) == 1
    assert model["one"][0] is model["two"][1]
    assert isinstance(model["one"][0], Int8Linear)


def test_what_int8_does_not_compute_stays_in_floating_point():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.MultiheadAttention(8, 2), nn.Linear(4, 4))
    assert quantize_module_(model) == 1
    x = torch.randn(3, 1, 8)
    assert model[1](x, x, x)[0].shape == (3, 1, 8)


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(UserError, match="'int3'"):
        quantize_module_(unet(), "int3")
