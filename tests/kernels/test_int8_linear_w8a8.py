"""The int8 linear with int8 activations: exact sums, a bounded error, and no derivative to be wrong about."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.kernels import int8_linear_w8a8, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.mep_lightning.int8_linear_w8a8.default


def layer(outputs: int = 6, inputs: int = 7):
    generator = torch.Generator().manual_seed(0)
    q, scale = quantize_rows(torch.randn(outputs, inputs, generator=generator))
    return q, scale, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (0, 7), (2, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype, shape):
    q, scale, bias = layer()
    x = torch.randn(shape).to(dtype)
    for b in (None, bias):
        y = int8_linear_w8a8(x, q, scale, b)
        assert y.dtype == dtype
        assert torch.equal(y, int8_linear_w8a8.reference(x, q, scale, b))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 6, 1), (1, 3, 320), (17, 1, 64), (77, 640, 2048)], ids=str)
def test_equals_the_reference_at_sizes_where_products_of_integers_go_wrong(sizes):
    rows, outputs, inputs = sizes
    q, scale, bias = layer(outputs, inputs)
    x = torch.randn(rows, inputs)
    assert torch.equal(int8_linear_w8a8(x, q, scale, bias), int8_linear_w8a8.reference(x, q, scale, bias))


def test_the_largest_sums_are_exact():
    q, x = torch.full((2, 5120), 127, dtype=torch.int8), torch.full((3, 5120), 127.0)
    assert int8_linear_w8a8(x, q, torch.ones(2)).eq(127 * 127 * 5120).all()  # 27 bits: fp32 holds this product


def test_the_error_is_that_of_rounding_the_activations():
    q, scale, bias = layer(64, 512)
    x = torch.randn(33, 512)
    weight = q.double() * scale.double()[:, None]
    bound = (x.abs().amax(1).double() / 254)[:, None] * weight.abs().sum(1)  # half a step of every activation
    exact = x.double() @ weight.T + bias.double()
    assert ((int8_linear_w8a8(x, q, scale, bias) - exact).abs() <= 1.001 * bound).all()


def test_an_outlier_in_one_row_leaves_the_others_alone():
    q, scale, _ = layer()
    x = torch.randn(3, 7)
    loud = x.clone()
    loud[1, 2] = 1e6
    assert torch.equal(int8_linear_w8a8(loud, q, scale)[[0, 2]], int8_linear_w8a8(x, q, scale)[[0, 2]])


def test_a_view_is_read_right():
    q, scale, bias = layer()
    x = torch.randn(3, 7, 5).transpose(1, 2)
    assert torch.equal(int8_linear_w8a8(x, q, scale, bias), int8_linear_w8a8(x.contiguous(), q, scale, bias))


def test_a_derivative_is_refused_and_not_silently_zero():
    q, scale, bias = layer()
    x = torch.randn(3, 7)
    with pytest.raises(NotImplementedError, match="has no derivative: use int8_linear"):
        int8_linear_w8a8(x.clone().requires_grad_(), q, scale, bias)
    with pytest.raises(NotImplementedError, match="has no derivative: use int8_linear"):
        torch.func.jvp(lambda x: int8_linear_w8a8(x, q, scale, bias), (x,), (x,))
    with torch.no_grad():
        int8_linear_w8a8(x.clone().requires_grad_(), q, scale, bias)


def test_opcheck():
    q, scale, bias = layer()
    for x in (torch.randn(3, 5, 7), torch.randn(5, 3, 7).transpose(0, 1), torch.randn(4, 7).bfloat16()):
        torch.library.opcheck(OP, (x, q, scale, bias))
        torch.library.opcheck(OP, (x, q, scale, None))


def test_compiles_in_one_graph():
    q, scale, bias = layer()
    x = torch.randn(5, 7)
    compiled = torch.compile(int8_linear_w8a8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, q, scale, bias), int8_linear_w8a8(x, q, scale, bias))


def test_works_under_fake_tensors():
    q, scale, bias = layer()
    with FakeTensorMode() as mode:  # no gradient is asked for, whatever the grad mode
        y = int8_linear_w8a8(torch.randn(3, 7).bfloat16(), *(mode.from_tensor(t) for t in (q, scale, bias)))
    assert (y.shape, y.dtype) == ((3, 6), torch.bfloat16)


def test_autocast_decides_the_outputs_dtype():
    q, scale, bias = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert int8_linear_w8a8(torch.randn(3, 7), q, scale, bias).dtype == torch.bfloat16
