"""Matrix products on a CPU: PyTorch gives fp32 ones to MKL, which leaves AVX-512 unused on other makers' processors.

There oneDNN's product, which PyTorch has as well, makes int8 linears 1.7 to 2.2 times as fast at SD1.5's sizes
(`benchmarks kernels`, AMD EPYC, 2 threads). Intel's own were not measured and keep MKL.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from mep_lightning.kernels.dispatch import is_plain, overridable

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products go to oneDNN: on a CPU with AVX-512 that is not Intel's, where PyTorch would take MKL."""
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and is_wide and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _is_intel()


def onednn_knows(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in a dtype here: in half precision not every CPU does, and PyTorch's own stand in."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in CPUINFO.read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


def runs_onednn(*tensors: Tensor | None) -> bool:
    """Whether a product of these may go around PyTorch's own: on a CPU, where nobody traces or differentiates it."""
    given = [tensor for tensor in tensors if tensor is not None]
    return is_plain(*given) and all(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in given)


@overridable
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, as fast as this machine can. x [..., I], weight [O, I], bias [O], all of one dtype -> [..., O]."""
    if x.dtype == torch.float32 and runs_onednn(x, weight, bias) and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
