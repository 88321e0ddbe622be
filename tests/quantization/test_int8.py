"""int8 weights: how far they are from the float ones, and their trainable scales."""

import pytest
import torch
from torch import nn

from mep_lightning.quantization import Int8Conv2d, Int8Linear, quantize_int8


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


LAYERS = {"linear": (Int8Linear, nn.Linear(7, 6), [3, 7]), "conv": (Int8Conv2d, nn.Conv2d(5, 6, 3), [2, 5, 9, 8])}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_scale_can_be_trained(kind):
    cls, source, shape = LAYERS[kind]
    layer, x = cls.from_float(source), torch.randn(shape)
    layer.scale.requires_grad_()
    (by_kernel,) = torch.autograd.grad(layer(x).sum(), layer.scale)
    values = {"weight": layer.dequantize(), "bias": layer.bias}
    (by_autograd,) = torch.autograd.grad(torch.func.functional_call(source, values, x).sum(), layer.scale)
    torch.testing.assert_close(by_kernel, by_autograd)
