"""Quantised layers, whatever they pack: what may and may not happen to them."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.quantization import Int4Conv2d, Int4Linear, Int8Conv2d, Int8Linear, int4, layers, why_not_int4

LINEAR, IMAGE = torch.Size([3, 7]), torch.Size([2, 5, 9, 8])


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 6, bias)


def conv(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 6, 3, stride=2, padding=1, bias=bias)


class Kind:
    """One of the four layers: its class, its float twin, an input, the dtypes of its buffers, its relative error."""

    def __init__(self, cls, make, shape, dtypes, error):
        self.cls, self.make, self.shape, self.dtypes, self.error = cls, make, shape, dtypes, error

    def __call__(self, bias=True):
        return self.cls.from_float(self.make(bias))

    def twin(self, layer):
        """The float layer with the weight that a quantised one computes with."""
        twin = self.make(layer.bias is not None)
        twin.load_state_dict({"weight": layer.dequantize()} | ({} if layer.bias is None else {"bias": layer.bias}))
        return twin

    def input(self, dtype=torch.float32):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(dtype)


INT8, INT4 = {"weight": torch.int8, "scale": torch.float32}, {"weight": torch.uint8, "absmax": torch.float32}
KINDS = {
    "int8 linear": Kind(Int8Linear, linear, LINEAR, INT8, 0.02),
    "int8 conv": Kind(Int8Conv2d, conv, IMAGE, INT8, 0.02),
    "int4 linear": Kind(Int4Linear, linear, LINEAR, INT4, 0.2),
    "int4 conv": Kind(Int4Conv2d, conv, IMAGE, INT4, 0.2),
}


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param.startswith("int4") and why_not_int4():
        pytest.skip(why_not_int4())
    return KINDS[request.param]


def held(layer):
    return {name: value.dtype for name, value in layer.named_buffers()}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_dequantised_weight(kind, bias):
    source = kind.make(bias)
    layer, x = kind.cls.from_float(source), kind.input()
    torch.testing.assert_close(layer(x), kind.twin(layer)(x))
    assert layer.bias is source.bias
    error = (layer(x) - source(x)).detach()
    assert 0 < error.norm() < kind.error * source(x).detach().norm()


def test_gradients_equal_those_of_the_dequantised_layer(kind):
    layer = kind()
    twin, inputs = kind.twin(layer), [kind.input().requires_grad_() for _ in range(2)]
    for module, x in zip((layer, twin), inputs, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


def test_no_float_weight_is_kept_for_backward(kind):
    layer, kept = kind(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(kind.input().requires_grad_())
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in layer.buffers()}


@pytest.mark.parametrize("cls", [Int8Linear, Int4Linear])
def test_a_linear_on_images_sums_its_bias_over_the_right_dimensions(cls):
    if cls is Int4Linear and why_not_int4():
        pytest.skip(why_not_int4())
    layer, x = cls.from_float(linear()), torch.randn(2, 3, 4, 7, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 24.0))


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
CAST_TO = {"half": torch.float16, "type": torch.float16, "double": torch.float64, "float": torch.float32}


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_reaches_what_is_packed(kind, cast):
    layer, dtype = kind(), CAST_TO.get(cast, torch.bfloat16)
    before = [value.clone() for value in layer.buffers()]
    layer = CASTS[cast](layer)
    assert held(layer) == kind.dtypes
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))
    assert layer.bias.dtype == dtype
    assert layer(kind.input(dtype)).dtype == dtype


def test_the_arithmetic_follows_the_activation_not_the_module(kind):
    layer, x = kind(), kind.input()
    expected = layer(x)
    layer.bfloat16()
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-3)  # only the bias was rounded
    assert layer(x.half()).dtype == torch.float16


def test_moves_between_devices_go_through(kind):
    layer = kind().to("meta", torch.bfloat16)
    assert {t.device.type for t in (*layer.buffers(), layer.bias)} == {"meta"}
    assert (held(layer), layer.bias.dtype) == (kind.dtypes, torch.bfloat16)
    layer = layer.to_empty(device="cpu")
    assert (layer.weight.device.type, held(layer)) == ("cpu", kind.dtypes)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, assign):
    layer, other, x = kind(), kind(), kind.input()
    other.quantize_(torch.randn(other.weight_shape))
    assert set(layer.state_dict()) == {*kind.dtypes, "bias"}
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert held(other) == kind.dtypes
    assert torch.equal(other(x), layer(x))


def test_a_float_checkpoint_is_packed_as_it_loads(kind):
    source, x = kind.make(), kind.input()
    model = nn.ModuleDict({"layer": kind.cls.from_float(kind.make().to("meta"))})
    assert model["layer"].weight.is_meta
    model.load_state_dict({f"layer.{key}": value for key, value in source.state_dict().items()}, assign=True)
    assert torch.equal(model["layer"](x), kind.cls.from_float(source)(x))


def test_copies_keep_everything(kind):
    layer, x = kind(), kind.input()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_parameters_hold_floating_point_only(kind):
    layer = kind()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(True).requires_grad_(False)  # would raise for an int8 parameter


def test_works_under_fake_tensors(kind):
    with FakeTensorMode():
        layer = kind()
        y = layer(torch.randn(kind.shape, dtype=torch.bfloat16))
    assert (held(layer), y.dtype) == (kind.dtypes, torch.bfloat16)
    assert y.shape == kind.make()(kind.input()).shape


def test_forward_mode_tangents_are_right_and_not_silently_zero(kind):
    layer, x, tangent = kind(bias=False).requires_grad_(False), kind.input(), torch.randn(kind.shape)
    _, y_tangent = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y_tangent, layer(tangent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_activations_dtype(kind, dtype):
    layer, x = kind(), kind.input()
    with torch.autocast("cpu", dtype=dtype):
        y, expected = layer(x), kind.twin(layer)(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_integer_activations_are_refused_with_the_cause(kind):
    with pytest.raises(TypeError, match=r"casts them to `weight.dtype`"):
        kind()(kind.input().to(torch.uint8))


def test_a_weight_is_packed_in_portions_as_it_is_whole(kind, monkeypatch):
    layer, rows = kind(), []
    weight = torch.randn(130, *layer.weight_shape[1:])
    layer.weight_shape = weight.shape
    whole = kind.cls.pack(layer, weight)
    pack = kind.cls.pack
    monkeypatch.setattr(kind.cls, "pack", lambda self, part: (rows.append(len(part)), pack(self, part))[1])
    monkeypatch.setattr(layers, "PORTION", 1)
    layer.quantize_(weight.double(), torch.device("cpu"))
    assert rows == [64, 64, 2] and layers.ROWS % int4.BLOCK == 0
    assert all(torch.equal(getattr(layer, name), value) for name, value in zip(layer.packed, whole, strict=True))


def test_a_weight_of_another_shape_is_refused(kind):
    layer = kind()
    wrong = torch.Size([*layer.weight_shape[:-1], layer.weight_shape[-1] + 1])
    with pytest.raises(ValueError, match=r"weight has shape .*, but the layer has"):
        layer.quantize_(torch.zeros(wrong))


@pytest.mark.parametrize("cls", [Int8Conv2d, Int4Conv2d])
@pytest.mark.parametrize("kwargs", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "circular"}])
def test_a_convolution_of_another_kind_is_refused(cls, kwargs):
    with pytest.raises(ValueError, match=f"{cls.__name__} does not compute"):
        cls.from_float(nn.Conv2d(4, 4, 3, **kwargs))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_what_libraries_ask_for(kind, bias):
    layer, source = kind(bias), kind.make(bias)
    assert isinstance(layer, type(source))
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding")
    for name in names:
        assert getattr(layer, name, None) == getattr(source, name, None)
