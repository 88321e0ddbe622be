"""The int8 convolution: its reference, gradients without a kept weight, memory formats, and every mode of PyTorch."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mep_lightning.kernels import int8_conv2d
from mep_lightning.kernels.dequantize import dequantize_reference
from mep_lightning.quantization import quantize_int8

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GEOMETRY = {  # (I, O, kernel, stride, padding) of what a U-Net holds, and an odd one
    "3x3": (5, 6, (3, 3), 1, 1),
    "1x1": (5, 6, (1, 1), 1, 0),
    "downsampler": (4, 6, (3, 3), 2, 1),
    "oblong": (3, 4, (3, 1), (1, 2), (2, 0)),
}
OP = torch.ops.mep_lightning.int8_conv2d.default


def layer(case: str):
    inputs, outputs, kernel, stride, padding = GEOMETRY[case]
    generator = torch.Generator().manual_seed(0)
    q, scale = quantize_int8(torch.randn(outputs, inputs, *kernel, generator=generator))
    x = torch.randn(2, inputs, 9, 8, generator=generator)
    return x, q, scale, torch.randn(outputs, generator=generator), stride, padding


@pytest.mark.parametrize("case", GEOMETRY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_the_reference(case, dtype, memory_format):
    x, q, scale, bias, stride, padding = layer(case)
    x, q = x.to(dtype).contiguous(memory_format=memory_format), q.contiguous(memory_format=memory_format)
    for b in (None, bias):
        y, expected = (f(x, q, scale, b, stride, padding) for f in (int8_conv2d, int8_conv2d.reference))
        assert y.dtype == dtype
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, **rounding(dtype))


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """What two orders of the same products may differ by: bf16 is rounded before its scale and after."""
    unit = torch.finfo(dtype).eps
    return {"rtol": 4 * unit, "atol": 16 * unit}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_comes_in_portions_gives_the_same(dtype, monkeypatch):
    x, q, scale, bias, stride, padding = layer("3x3")
    monkeypatch.setattr(sys.modules["mep_lightning.kernels.int8_conv2d"], "PORTION", 4 * q[0].numel() * dtype.itemsize)
    for b in (None, bias):
        whole = int8_conv2d.reference(x.to(dtype), q, scale, b, stride, padding)
        portions = int8_conv2d(x.to(dtype), q, scale, b, stride, padding)
        assert portions.shape == whole.shape
        torch.testing.assert_close(portions, whole, **rounding(dtype))


def test_bf16_is_as_near_to_the_exact_convolution_as_the_reference():
    generator = torch.Generator().manual_seed(1)
    q, scale = quantize_int8(torch.randn(48, 64, 3, 3, generator=generator))
    x, bias = torch.randn(2, 64, 8, 8, generator=generator).bfloat16(), torch.randn(48, generator=generator)
    exact = int8_conv2d.reference(x.double(), q, scale, bias, 1, 1)
    ours, theirs = ((f(x, q, scale, bias, 1, 1) - exact).norm() for f in (int8_conv2d, int8_conv2d.reference))
    assert ours < 1.25 * theirs


@pytest.mark.parametrize("case", GEOMETRY)
def test_fp32_in_means_fp32_arithmetic(case):
    x, q, scale, bias, stride, padding = layer(case)
    weight = q.double() * scale.double().view(-1, 1, 1, 1)
    exact = F.conv2d(x.double(), weight, bias.double(), stride, padding)
    torch.testing.assert_close(int8_conv2d(x, q, scale, bias, stride, padding).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GEOMETRY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_dequantised_layer(case, dtype):
    x, q, scale, bias, stride, padding = layer(case)
    gradients = []
    for function in (int8_conv2d, int8_conv2d.reference):
        inputs = [t.clone().requires_grad_() for t in (x.to(dtype), scale, bias)]
        y = function(inputs[0], q, inputs[1], inputs[2], stride, padding)
        gradients.append(torch.autograd.grad((0.05 * y.float()).sin().sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-3 if dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("train_scale", [False, True])
def test_no_dequantised_weight_is_kept_for_backward(train_scale):
    x, q, scale, bias, stride, padding = layer("3x3")
    x.requires_grad_(), scale.requires_grad_(train_scale)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        int8_conv2d(x, q, scale, bias, stride, padding)
    allowed = {q.data_ptr(), scale.data_ptr()} | ({x.data_ptr()} if train_scale else set())
    assert {t.data_ptr() for t in saved} <= allowed


@pytest.mark.parametrize("case", GEOMETRY)
def test_opcheck(case):
    x, q, scale, bias, stride, padding = layer(case)
    pair = [n if isinstance(n, tuple) else (n, n) for n in (stride, padding)]
    torch.library.opcheck(OP, (x, q, scale, None, *pair))
    torch.library.opcheck(OP, (x.contiguous(memory_format=torch.channels_last), q, scale, bias, *pair))
    torch.library.opcheck(OP, (x.requires_grad_(), q, scale.requires_grad_(), bias.requires_grad_(), *pair))


def test_compiles_in_one_graph():
    x, q, scale, bias, stride, padding = layer("downsampler")
    compiled = torch.compile(int8_conv2d, fullgraph=True, backend="aot_eager")
    arguments = (x.requires_grad_(), q, scale, bias, stride, padding)
    torch.testing.assert_close(compiled(*arguments), int8_conv2d(*arguments))


@pytest.mark.parametrize("case", GEOMETRY)
def test_works_under_fake_tensors(case):
    x, q, scale, bias, stride, padding = layer(case)
    expected = int8_conv2d(x, q, scale, bias, stride, padding).shape
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, q, scale, bias)]
        y = int8_conv2d(fakes[0].bfloat16(), *fakes[1:], stride, padding)
    assert (y.shape, y.dtype) == (expected, torch.bfloat16)


def test_autocast_decides_the_activations_dtype():
    x, q, scale, bias, stride, padding = layer("3x3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = int8_conv2d(x, q, scale, bias, stride, padding)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, int8_conv2d(x.bfloat16(), q, scale, bias, stride, padding))


def test_forward_mode_tangents_are_right_and_not_silently_zero():
    x, q, scale, bias, stride, padding = layer("downsampler")
    tangent = torch.randn_like(x)
    _, y_tangent = torch.func.jvp(lambda x: int8_conv2d(x, q, scale, bias, stride, padding), (x,), (tangent,))
    weight = dequantize_reference(q, scale, torch.float32)
    torch.testing.assert_close(y_tangent, F.conv2d(tangent, weight, None, stride, padding))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", GEOMETRY)
def test_cuda_is_close_to_its_reference(case):
    *tensors, stride, padding = layer(case)
    tensors = [t.cuda() for t in tensors]
    y, expected = (f(*tensors, stride, padding) for f in (int8_conv2d, int8_conv2d.reference))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
