"""What operations hold only while they run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.performance.memory import allocated_peak
from mep_lightning.kernels.int8_conv2d import PORTION
from mep_lightning.plan import transient as module
from mep_lightning.plan.transient import transient

OURS, CONVOLUTION = torch.ops.mep_lightning, torch.ops.aten.convolution.default


def test_an_operation_of_our_own_holds_its_dequantised_weight():
    x, q = torch.zeros(2, 7, dtype=torch.float16), torch.zeros(6, 7, dtype=torch.int8)
    assert transient(OURS.int8_linear.default, (x, q)) == 84
    assert transient(torch.ops.aten.add.Tensor, (x, x)) == 0


def test_a_large_convolutions_weight_comes_in_portions_on_a_cpu():
    with FakeTensorMode():
        x, q = torch.empty(1, 2560, 8, 8), torch.empty(1280, 2560, 3, 3, dtype=torch.int8)
        given = x, q, None, None, (1, 1), (1, 1)
        assert transient(OURS.int8_conv2d.default, given, on_cpu=True) == 2 * PORTION
        assert transient(OURS.int8_conv2d.default, given) == 4 * q.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("side", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (1, 2, 0)])
def test_a_convolution_takes_what_this_cpu_takes_for_it(dtype, side, stride, padding):
    """By oneDNN, where it has the dtype, or by PyTorch's own on patches laid side by side.

    oneDNN now and then brings more into an order of its own than the weight, and now and then nothing.
    """
    x, weight = torch.randn(2, 48, 33, 31).to(dtype), torch.randn(96, 48, side, side).to(dtype)
    with torch.no_grad():
        answer = F.conv2d(x, weight, None, stride, padding)
        taken = allocated_peak(lambda: F.conv2d(x, weight, None, stride, padding)) - answer.nbytes
    planned = transient(CONVOLUTION, (x, weight, None, [stride] * 2, [padding] * 2, [1, 1]), on_cpu=True)
    slack = 2.5 * weight.nbytes + x.nbytes + answer.nbytes if module.onednn_knows(dtype) else weight.nbytes
    assert taken == pytest.approx(planned, rel=0.1, abs=slack)


def test_without_half_precision_in_onednn_patches_are_laid_side_by_side(monkeypatch):
    monkeypatch.setattr(module, "onednn_knows", lambda dtype: False)
    x, weight = torch.zeros(2, 4, 8, 6, dtype=torch.bfloat16), torch.zeros(5, 4, 3, 3, dtype=torch.bfloat16)
    given = x, weight, None, [2, 1], [1, 1], [1, 1]
    assert transient(CONVOLUTION, given, on_cpu=True) == 2 * (2 * 4 * 9) * (4 * 6)
    assert transient(OURS.int8_conv2d.default, (x, weight.char(), None, None, (2, 1), (1, 1)), on_cpu=True) == (
        2 * (2 * 4 * 9) * (4 * 6) + weight.nbytes
    )
