"""Answers from memory are the answers that fake tensors give, storages and all."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from mep_lightning import kernels
from mep_lightning.plan.answers import Answers
from mep_lightning.plan.tracker import LiveBytes


class Counted(FakeTensorMode):
    """Counts what it is asked."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def described(values):
    """Shapes, strides, offsets, dtypes, devices and gradients of tensors, and who shares a storage with whom."""
    owners = {}
    return [
        (
            *(value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad),
            owners.setdefault(value.untyped_storage()._cdata, len(owners)),
            value.untyped_storage().nbytes(),
        )
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    ]


def views():
    x = torch.randn(4, 6)
    y = x[:, 2:5]
    return [
        x,
        y,
        y.t(),
        x.view(24),
        *x.split(2),
        *x.unbind(1),
        x.expand(3, 4, 6),
        x.detach(),
        x[1, 2],
        x.view(torch.int32),
    ]


def in_place():
    x = torch.zeros(3, 5)
    y = x.add_(1)
    z = x[1:].mul_(2)
    out = torch.empty(3, 5)
    return [x, y, z, y is x, torch.mul(x, x, out=out), out]


def attention():
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    told = F.scaled_dot_product_attention(q, q, q)
    told.sum().backward()
    return [told, q.grad]


def convolution():
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    y = F.group_norm(F.conv2d(x, weight, padding=1), 2)
    F.silu(y).mean().backward()
    return [y, x.grad, weight.grad]


def ours():
    weight = torch.randint(-127, 127, (8, 16), dtype=torch.int8)
    return [kernels.int8_linear(torch.randn(3, 16), weight, torch.rand(8), None)]


def reshaped():
    x = torch.empty(0)
    x.resize_(3, 4)
    y = torch.empty(2)
    y.set_(torch.zeros(5, 6))
    like = torch.zeros(5, 6)
    other = torch.empty(5, 6)
    other.set_(like)
    return [x, y, x + 1, y + 1, like, other]


def numbers():
    x = torch.tensor([1.0, 2.0])
    return [x, torch.tensor(3.0).item(), (x * 2).to(torch.float16), torch.arange(4), torch.empty(3, dtype=torch.int64)]


def aliases():
    a, b = torch.zeros(4), torch.zeros(4)
    with torch.inference_mode():
        c, d, e = (torch.zeros(4) for _ in range(3))
        first, second = torch.mul(c, d, out=c), torch.mul(c, d, out=e)
    pair = torch.zeros(8)
    return [a.view(2, 2), first is c, second is e, c, d, e, torch.maximum(a, b), torch.maximum(a, a), a, b, pair[:4]]


def inference():
    x = torch.zeros(4)
    with torch.inference_mode():
        y = torch.zeros(4)
        inside = [x.view(2, 2), y.view(2, 2), y + 1]
    return [*inside, x.view(2, 2), [one.is_inference() for one in (*inside, x.view(2, 2), x + 1, y.view(2, 2))]]


def odd():
    x = torch.full((3,), float("nan"))
    parts = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_add_(parts, 1.0)
    return [x, torch.zeros(3, dtype=torch.complex64).real, torch._neg_view(torch.zeros(3)).is_neg(), *parts]


CASES = [views, in_place, attention, convolution, ours, reshaped, numbers, aliases, inference, odd]


@pytest.mark.parametrize("case", CASES)
def test_an_answer_from_memory_is_the_answer(case):
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = described(case())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, LiveBytes(answer=Answers(mode)):
        for _ in range(3):
            told = case()
            assert described(told) == expected
            assert all(type(one) is FakeTensor for one in told if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("case", CASES)
def test_as_many_bytes_live_at_every_peak(case):
    peaks = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for counter in (LiveBytes(), *[LiveBytes(answer=Answers(mode))] * 3):
        gc.collect()
        with mode, counter:
            counter.reset_peak()
            before = counter.now
            told = case()
            peaks.append((counter.peak - before, counter.now - before))
            del told
            assert counter.now == before
    assert len(set(peaks)) == 1


@pytest.mark.parametrize("case", [views, in_place, attention, convolution, ours])
def test_what_is_known_is_not_asked(case):
    mode = Counted()
    with mode, LiveBytes(answer=Answers(mode)):
        case()
        first, mode.asked = mode.asked, 0
        case()
    assert first > 0
    assert mode.asked == 0


def test_sparse_tensors_are_left_alone():
    mode = FakeTensorMode()
    with mode, LiveBytes(answer=Answers(mode)) as live:
        for _ in range(2):
            assert torch.empty(3, 3, layout=torch.sparse_coo).layout is torch.sparse_coo
        assert live.now == 0


def test_what_is_never_the_same_question_is_not_remembered():
    mode = FakeTensorMode()
    told = Answers(mode)
    with mode, LiveBytes(answer=told):
        torch.full((3,), 1.0)
        known = len(told._known)
        for _ in range(5):
            torch.full((3,), float("nan"))
        assert len(told._known) == known


def test_nothing_outlives_its_answer():
    """No argument is kept by what is remembered of it, nor until the next collection of garbage."""
    mode = FakeTensorMode()
    gc.disable()
    try:
        with mode, LiveBytes(answer=Answers(mode)) as live:
            (torch.empty(1000, 1000) @ torch.empty(1000, 10)).relu().sum()
            assert live.now == 0
    finally:
        gc.enable()


def test_another_default_dtype_is_another_question():
    mode = FakeTensorMode()
    with mode, LiveBytes(answer=Answers(mode)):
        assert torch.empty(3).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.empty(3).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
