"""Symmetric int8, a scale a row: the bound on its error, its reference, memory formats and PyTorch's modes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.kernels import quantize_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
OP = torch.ops.mep_lightning.quantize_rows.default


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_error_is_at_most_half_a_scale(rows):
    x = torch.tensor(rows)
    q, scale = quantize_rows(x)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and (scale > 0).all()
    assert q.min() >= -127
    error = (q.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= 0.5 * scale.double()[:, None] * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 3, 3, 3), (2, 5, 1, 1)], ids=str)
def test_equals_the_reference(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for ours, theirs in zip(quantize_rows(x), quantize_rows.reference(x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_row_of_zeros_has_scale_1_and_stays_zero():
    q, scale = quantize_rows(torch.tensor([[0.0, 0.0], [2.0, -4.0]]))
    assert q.tolist() == [[0, 0], [64, -127]]
    assert scale.tolist() == pytest.approx([1, 4 / 127])


def test_the_memory_format_is_kept():
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    q, _ = quantize_rows(x)
    assert q.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(q, quantize_rows(x.contiguous())[0])


def test_no_gradient_flows_through():
    q, scale = quantize_rows(torch.randn(3, 4, requires_grad=True))
    assert not q.requires_grad and not scale.requires_grad


def test_opcheck():
    for x in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last)):
        torch.library.opcheck(OP, (x,))


def test_works_under_fake_tensors():
    with FakeTensorMode():
        q, scale = quantize_rows(torch.randn(3, 4, 2, dtype=torch.bfloat16))
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((3, 4, 2), torch.int8, (3,), torch.float32)


def test_a_row_with_a_nan_is_no_number_any_more_and_others_stay():
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, -2.0, 0.5]])
    q, scale = quantize_rows(x)
    assert scale[0].isnan() and scale[1] == 2 / 127
    assert q[1].tolist() == [64, -127, 32]
