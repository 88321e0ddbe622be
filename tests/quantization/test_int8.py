"""int8 weights: how far they are from the float ones, and what may and may not happen to the layers that hold them."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.quantization import Int8Conv2d, Int8Linear, quantize_int8


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 6, bias)


def conv(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 6, 3, stride=2, padding=1, bias=bias)


LAYERS = {
    "linear": (linear, Int8Linear, torch.Size([3, 7])),
    "conv": (conv, Int8Conv2d, torch.Size([2, 5, 9, 8])),
}


@pytest.mark.parametrize("shape", [(6, 7), (6, 5, 3, 3), (1, 1), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_error_is_at_most_half_a_scale(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    q, scale = quantize_int8(weight)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, weight.shape, shape[:1])
    wide, per_output = weight.double().flatten(1), scale.double()[:, None]
    error = (wide - q.double().flatten(1) * per_output).abs()
    assert (error <= per_output * 0.5 * (1 + 1e-5)).all()
    torch.testing.assert_close(scale.double(), wide.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (q.flatten(1).abs().amax(1) == 127).all()  # every channel uses its whole range, and -128 never


def test_each_channel_has_its_own_scale():
    weight = torch.randn(2, 64)
    outlier = weight.clone()
    outlier[0, 0] = 1000.0
    assert torch.equal(quantize_int8(weight)[0][1], quantize_int8(outlier)[0][1])


def test_zeros_and_subnormal_channels_stay_finite():
    weight = torch.stack([torch.zeros(4), torch.full((4,), 1e-45), torch.tensor([1.0, -1.0, 0.5, 0.0])])
    q, scale = quantize_int8(weight)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert not q[:2].any()
    assert q[2].tolist() == [127, -127, 64, 0]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_dequantised_weight(kind, bias):
    make, cls, shape = LAYERS[kind]
    source = make(bias)
    layer, twin, x = cls.from_float(source), make(bias), torch.randn(shape)
    twin.load_state_dict({**source.state_dict(), "weight": layer.dequantize()})
    torch.testing.assert_close(layer(x), twin(x))
    assert layer.bias is source.bias
    error = (layer(x) - source(x)).detach()
    assert 0 < error.norm() < 0.02 * source(x).detach().norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_equal_those_of_the_dequantised_layer(kind):
    make, cls, shape = LAYERS[kind]
    layer, twin = cls.from_float(make()), make()
    twin.load_state_dict({**layer.state_dict(), "weight": layer.dequantize()}, strict=False)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for module, x in zip((layer, twin), inputs, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_scale_can_be_trained(kind):
    make, cls, shape = LAYERS[kind]
    layer, x = cls.from_float(make()), torch.randn(shape)
    layer.scale.requires_grad_()
    (by_kernel,) = torch.autograd.grad(layer(x).sum(), layer.scale)
    twin = make()
    values = {"weight": layer.dequantize(), "bias": layer.bias}
    (by_autograd,) = torch.autograd.grad(torch.func.functional_call(twin, values, x).sum(), layer.scale)
    torch.testing.assert_close(by_kernel, by_autograd)


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float16),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "in a parent": lambda m: nn.Sequential(nn.Sequential(m)).to(torch.bfloat16)[0][0],
    "channels last": lambda m: m.to(torch.bfloat16, memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_no_cast_reaches_weight_or_scale(kind, cast):
    make, cls, shape = LAYERS[kind]
    layer = cls.from_float(make())
    weight, scale = layer.weight.clone(), layer.scale.clone()
    layer = CASTS[cast](layer)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.scale, scale)
    expected = {"half": torch.float16, "type": torch.float16, "double": torch.float64, "float": torch.float32}
    dtype = expected.get(cast, torch.bfloat16)
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(shape, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", LAYERS)
def test_the_arithmetic_follows_the_activation_not_the_module(kind):
    make, cls, shape = LAYERS[kind]
    layer, x = cls.from_float(make()), torch.randn(shape)
    expected = layer(x)
    layer.bfloat16()
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-3)  # only the bias was rounded
    assert layer(x.half()).dtype == torch.float16


@pytest.mark.parametrize("kind", LAYERS)
def test_moves_between_devices_go_through(kind):
    make, cls, _ = LAYERS[kind]
    layer = cls.from_float(make()).to("meta", torch.bfloat16)
    assert {t.device.type for t in (layer.weight, layer.scale, layer.bias)} == {"meta"}
    assert (layer.weight.dtype, layer.scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    layer = layer.to_empty(device="cpu")
    assert (layer.weight.device.type, layer.weight.dtype, layer.scale.dtype) == ("cpu", torch.int8, torch.float32)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_round_trip(kind, assign):
    make, cls, shape = LAYERS[kind]
    layer, other, x = cls.from_float(make()), cls.from_float(make()), torch.randn(shape)
    other.quantize_(torch.randn(other.weight.shape))
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert (other.weight.dtype, other.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_float_checkpoint_is_quantised_as_it_loads(kind):
    make, cls, shape = LAYERS[kind]
    source, x = make(), torch.randn(shape)
    empty = cls.from_float(make().to("meta"))
    assert empty.weight.device.type == "meta"
    model = nn.ModuleDict({"layer": empty})
    model.load_state_dict({f"layer.{key}": value for key, value in source.state_dict().items()}, assign=True)
    assert torch.equal(model["layer"](x), cls.from_float(source)(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_keep_everything(kind):
    make, cls, shape = LAYERS[kind]
    layer, x = cls.from_float(make()), torch.randn(shape)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_hold_floating_point_only(kind):
    make, cls, _ = LAYERS[kind]
    layer = cls.from_float(make())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(True).requires_grad_(False)  # would raise for an int8 parameter


def test_integer_activations_are_refused_with_the_cause():
    layer = Int8Linear.from_float(linear())
    with pytest.raises(TypeError, match=r"casts them to `weight.dtype`"):
        layer(torch.randn(3, 7).to(layer.weight.dtype))


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(6, 7\)"):
        Int8Linear.from_float(linear()).quantize_(torch.randn(6, 8))


@pytest.mark.parametrize("kwargs", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "circular"}])
def test_a_convolution_of_another_kind_is_refused(kwargs):
    with pytest.raises(ValueError, match="Int8Conv2d does not compute"):
        Int8Conv2d.from_float(nn.Conv2d(4, 4, 3, **kwargs))


@pytest.mark.parametrize("kind", LAYERS)
def test_works_under_fake_tensors(kind):
    make, cls, shape = LAYERS[kind]
    with FakeTensorMode():
        layer = cls.from_float(make())
        y = layer(torch.randn(shape, dtype=torch.bfloat16))
    assert (layer.weight.dtype, layer.scale.dtype, y.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert y.shape == make()(torch.randn(shape)).shape


def test_is_a_linear_for_those_who_ask():
    layer = Int8Linear.from_float(linear())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (7, 6)
    assert isinstance(Int8Conv2d.from_float(conv()), nn.Conv2d)
