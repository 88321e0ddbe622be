"""The int8 linear: its reference, a float64 product, gradients without a kept weight, and every mode of PyTorch."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mep_lightning.kernels import int8_linear
from mep_lightning.kernels.dequantize import dequantize, dequantize_reference
from mep_lightning.quantization import quantize_int8

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.mep_lightning.int8_linear.default


def layer(outputs: int = 6, inputs: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, scale = quantize_int8(torch.randn(outputs, inputs, generator=generator))
    return q, scale, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (0, 7), (2, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype, shape):
    q, scale, bias = layer()
    x = torch.randn(shape, dtype=dtype)
    for b in (None, bias):
        y = int8_linear(x, q, scale, b)
        assert y.dtype == dtype
        unit = torch.finfo(dtype).eps  # bf16 is rounded before its scale and after; sums come in another order
        torch.testing.assert_close(y, int8_linear.reference(x, q, scale, b), rtol=4 * unit, atol=8 * unit)


def test_fp32_in_means_fp32_arithmetic():
    q, scale, bias = layer(64, 512)
    x = torch.randn(33, 512)
    exact = x.double() @ (q.double() * scale.double()[:, None]).T + bias.double()
    error = (int8_linear(x, q, scale, bias) - exact).abs().max()
    assert error < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (4, 3, 3, 3)], ids=str)
def test_the_transient_weight_is_the_references(dtype, shape):
    q, scale = quantize_int8(torch.randn(shape))
    assert torch.equal(dequantize(q, scale, dtype), dequantize_reference(q, scale, dtype))


def test_a_half_precision_weight_is_rounded_once():
    q, scale = quantize_int8(torch.randn(50, 40))
    exact = q.double() * scale.double()[:, None]
    bound = exact.abs() * 2**-8 * 1.001  # half a unit in bf16's last place
    assert ((dequantize(q, scale, torch.bfloat16) - exact).abs() <= bound).all()
    assert ((q.bfloat16() * scale.bfloat16()[:, None] - exact).abs() > bound).any()  # a scale in bf16 rounds twice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_those_of_the_dequantised_layer(dtype):
    q, scale, bias = layer()
    x = torch.randn(3, 5, 7, dtype=dtype)
    gradients = []
    for function in (int8_linear, int8_linear.reference):
        inputs = [t.clone().requires_grad_() for t in (x, scale, bias)]
        y = function(inputs[0], q, inputs[1], inputs[2])
        gradients.append(torch.autograd.grad((y * torch.arange(6, dtype=dtype)).sum(), inputs))
    for ours, theirs, source in zip(*gradients, (x, scale, bias), strict=True):
        assert ours.dtype == source.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


def test_a_scales_gradient_in_double_is_rounded_once():
    """Its terms are hundreds of times as large as their sum may be: added in fp32 they lost three digits of it."""
    q, scale, bias = layer()
    scale.requires_grad_()
    for seed in range(100):
        x = torch.randn(15, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        weight = torch.arange(6, dtype=torch.float64)
        (ours,) = torch.autograd.grad((int8_linear(x, q, scale, bias) * weight).sum(), scale)
        exact = weight * (x.sum(0) * q).sum(1)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-7, atol=0)


def test_gradcheck_in_double():
    q, scale, bias = layer(3, 4)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: OP(x, q, scale, b), (x, bias.double().requires_grad_()))


def saved_by(function, *inputs) -> list[torch.Tensor]:
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return saved


def test_nothing_is_kept_for_backward_but_what_the_layer_holds_anyway():
    q, scale, bias = layer()
    x = torch.randn(5, 7, requires_grad=True)
    assert {t.data_ptr() for t in saved_by(int8_linear, x, q, scale, bias)} <= {q.data_ptr(), scale.data_ptr()}
    dequantised = saved_by(int8_linear.reference, x, q, scale, bias)
    assert any(t.is_floating_point() and t.numel() == q.numel() for t in dequantised)  # else this test proves nothing


def test_a_trained_scale_keeps_the_activation_and_still_no_weight():
    q, scale, bias = layer()
    x = torch.randn(5, 7)
    saved = saved_by(int8_linear, x, q, scale.requires_grad_(), bias)
    assert {t.data_ptr() for t in saved} <= {q.data_ptr(), scale.data_ptr(), x.data_ptr()}


def test_opcheck():
    q, scale, bias = layer()
    x = torch.randn(3, 5, 7)
    torch.library.opcheck(OP, (x, q, scale, None))
    torch.library.opcheck(OP, (x.transpose(0, 1), q, scale, bias))
    torch.library.opcheck(OP, (x.bfloat16(), q, scale, bias))
    torch.library.opcheck(OP, (x.clone().requires_grad_(), q, scale.clone().requires_grad_(), bias.requires_grad_()))


def test_compiles_in_one_graph():
    q, scale, bias = layer()
    x = torch.randn(5, 7, requires_grad=True)
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, q, scale, bias), int8_linear(x, q, scale, bias))


def test_works_under_fake_tensors():
    q, scale, bias = layer()
    with FakeTensorMode() as mode:
        y = int8_linear(torch.randn(3, 7, dtype=torch.bfloat16), *(mode.from_tensor(t) for t in (q, scale, bias)))
    assert (y.shape, y.dtype) == ((3, 6), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_activations_dtype(dtype):
    q, scale, bias = layer()
    x = torch.randn(3, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = int8_linear(x, q, scale, bias)
        expected = F.linear(x, dequantize_reference(q, scale, torch.float32), bias)
        grad, expected_grad = (torch.autograd.grad(out.float().sum(), x)[0] for out in (y, expected))
    assert y.dtype == expected.dtype == dtype
    assert grad.dtype == expected_grad.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=2e-2)


def test_forward_mode_tangents_are_right_and_not_silently_zero():
    q, scale, bias = layer()
    x, tangent = torch.randn(3, 7), torch.randn(3, 7)
    y, y_tangent = torch.func.jvp(lambda x: int8_linear(x, q, scale, bias), (x,), (tangent,))
    torch.testing.assert_close(y, int8_linear(x, q, scale, bias))
    torch.testing.assert_close(y_tangent, tangent @ dequantize_reference(q, scale, torch.float32).T)
    with torch.autograd.forward_ad.dual_level():
        dual = int8_linear(torch.autograd.forward_ad.make_dual(x, tangent), q, scale, bias)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, y_tangent)


def test_vmap():
    q, scale, bias = layer()
    x = torch.randn(4, 3, 7)
    torch.testing.assert_close(torch.vmap(lambda x: int8_linear(x, q, scale, bias))(x), int8_linear(x, q, scale, bias))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_equals_its_reference(dtype):
    q, scale, bias = (t.cuda() for t in layer(64, 128))
    x = torch.randn(5, 128, dtype=dtype, device="cuda")
    assert torch.equal(int8_linear(x, q, scale, bias), int8_linear.reference(x, q, scale, bias))


def test_without_a_gradient_the_op_is_passed_by_with_the_same_bits(monkeypatch):
    x, q, scale = torch.randn(5, 16), *quantize_int8(torch.randn(8, 16))
    x.requires_grad_()
    through_the_op = int8_linear(x, q, scale)
    assert through_the_op.grad_fn is not None

    def refuse(*args):
        raise AssertionError("the op was called")

    module = sys.modules["mep_lightning.kernels.int8_linear"]  # the function of that name hides it
    monkeypatch.setattr(module, "_int8_linear", refuse)
    with torch.no_grad():
        assert torch.equal(int8_linear(x, q, scale), through_the_op)
    assert torch.equal(int8_linear(x.detach(), q, scale), through_the_op)
    with pytest.raises(AssertionError, match="the op was called"):
        int8_linear(x, q, scale)
