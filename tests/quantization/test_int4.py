"""NF4 weights: what they are, and what may and may not happen to the layers that hold them."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mep_lightning.errors import UserError
from mep_lightning.quantization import Int4Conv2d, Int4Linear, dequantize_nf4, quantize_nf4, why_not_int4

pytest.importorskip("bitsandbytes")
LEVELS = torch.tensor(  # table of the paper's appendix E
    [
        *(-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1),
    ],
    dtype=torch.float64,
)


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 6, bias)


def conv(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 6, 3, stride=2, padding=1, bias=bias)


LAYERS = {
    "linear": (linear, Int4Linear, torch.Size([3, 7])),
    "conv": (conv, Int4Conv2d, torch.Size([2, 5, 9, 8])),
}


@pytest.mark.parametrize("shape", [(6, 7), (6, 5, 3, 3), (1, 1), (64, 64), (3, 43)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_weight_becomes_the_nearest_level_of_its_block(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed, absmax = quantize_nf4(weight)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-weight.numel() // 2))
    assert (absmax.dtype, absmax.numel()) == (torch.float32, -(-weight.numel() // 64))
    back = dequantize_nf4(packed, absmax, weight.shape, torch.float32)
    for block, values in zip(weight.double().flatten().split(64), back.double().flatten().split(64), strict=True):
        scaled = block / block.abs().max()
        nearest = LEVELS[(scaled[:, None] - LEVELS).abs().argmin(1)] * block.abs().max()
        torch.testing.assert_close(values, nearest, rtol=1e-3 if dtype.itemsize == 2 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_dequantised_weight(kind, bias):
    make, cls, shape = LAYERS[kind]
    source = make(bias)
    layer, twin, x = cls.from_float(source), make(bias), torch.randn(shape)
    twin.load_state_dict({**source.state_dict(), "weight": layer.dequantize()})
    torch.testing.assert_close(layer(x), twin(x))
    assert layer.bias is source.bias
    assert 0 < (layer(x) - source(x)).norm() < 0.2 * source(x).norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_equal_those_of_the_dequantised_layer_and_no_weight_is_kept(kind):
    make, cls, shape = LAYERS[kind]
    layer, twin = cls.from_float(make()), make()
    twin.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias})
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(inputs[0])
    assert not kept
    y.square().sum().backward()
    twin(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


def test_a_linear_on_images_sums_its_bias_over_the_right_dimensions():
    layer, x = Int4Linear.from_float(linear()), torch.randn(2, 3, 4, 7, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 24.0))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_cast_reaches_the_packed_weight(kind, cast):
    make, cls, shape = LAYERS[kind]
    layer = cls.from_float(make())
    weight, absmax = layer.weight.clone(), layer.absmax.clone()
    layer = nn.Sequential(layer).to(cast)[0]
    assert torch.equal(layer.weight, weight) and torch.equal(layer.absmax, absmax)
    assert (layer.weight.dtype, layer.absmax.dtype, layer.bias.dtype) == (torch.uint8, torch.float32, cast)
    assert layer(torch.randn(shape, dtype=cast)).dtype == cast


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_round_trip_and_copies(kind):
    make, cls, shape = LAYERS[kind]
    layer, other, x = cls.from_float(make()), cls.from_float(make()), torch.randn(shape)
    other.quantize_(torch.randn(other.weight_shape))
    assert set(layer.state_dict()) == {"weight", "absmax", "bias"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_float_checkpoint_is_packed_as_it_loads(kind):
    make, cls, shape = LAYERS[kind]
    source, x = make(), torch.randn(shape)
    model = nn.ModuleDict({"layer": cls.from_float(make().to("meta"))})
    assert model["layer"].weight.is_meta
    model.load_state_dict({f"layer.{key}": value for key, value in source.state_dict().items()}, assign=True)
    assert torch.equal(model["layer"](x), cls.from_float(source)(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_works_under_fake_tensors(kind):
    make, cls, shape = LAYERS[kind]
    with FakeTensorMode():
        layer = cls.from_float(make())
        y = layer(torch.randn(shape, dtype=torch.bfloat16))
    assert (layer.weight.dtype, y.dtype) == (torch.uint8, torch.bfloat16)
    assert y.shape == make()(torch.randn(shape)).shape


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode_tangents_are_right_and_not_silently_zero(kind):
    make, cls, shape = LAYERS[kind]
    layer = cls.from_float(make(bias=False)).requires_grad_(False)
    x, tangent = torch.randn(shape), torch.randn(shape)
    _, y_tangent = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y_tangent, layer(tangent))


def test_autocast_decides_the_activations_dtype():
    layer, x = Int4Linear.from_float(linear()), torch.randn(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), F.linear(x, layer.dequantize(), layer.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_integer_activations_are_refused_with_the_cause():
    with pytest.raises(TypeError, match=r"casts them to `weight.dtype`"):
        Int4Linear.from_float(linear())(torch.zeros(3, 7, dtype=torch.uint8))


def test_without_bitsandbytes_one_sentence_says_so(monkeypatch):
    why_not_int4.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"precision int4: bitsandbytes cannot be imported .*pip install"):
        quantize_nf4(torch.randn(4, 4))
    why_not_int4.cache_clear()
