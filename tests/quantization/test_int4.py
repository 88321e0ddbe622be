"""NF4 weights: what they are, and what is said where they cannot be had."""

import sys

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize(
    "shape", [(6, 7), (6, 5, 3, 3), (1, 1), (64, 64), (3, 43), (5, 96), (160, 160), (32, 96, 3, 3)], ids=str
)
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


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 6), lambda: nn.Conv2d(7, 6, 3)], ids=["linear", "conv"])
def test_a_backward_pass_makes_the_weight_from_what_autograd_kept(make):
    """By then the layer's own buffers may hold something else."""
    torch.manual_seed(0)
    original = make().requires_grad_(False)
    layer = (Int4Linear if isinstance(original, nn.Linear) else Int4Conv2d).from_float(original)
    x = torch.randn(2, 7, requires_grad=True) if isinstance(original, nn.Linear) else torch.randn(2, 7, 5, 5)
    x.requires_grad_()
    original.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    (expected,) = torch.autograd.grad(original(x).square().sum(), x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved) or saved.clone(), lambda saved: saved
    ):
        y = layer(x)
    assert [saved.data_ptr() for saved in kept] == [
        layer.weight.data_ptr(),
        layer.absmax.data_ptr(),
    ]  # and nothing else
    layer.weight, layer.absmax = torch.zeros_like(layer.weight), torch.zeros_like(layer.absmax)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_bitsandbytes_one_sentence_says_so(monkeypatch):
    why_not_int4.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"precision int4: bitsandbytes cannot be imported .*pip install 'mep-lightning\[int4\]'"
    ):
        quantize_nf4(torch.randn(4, 4))
    why_not_int4.cache_clear()
