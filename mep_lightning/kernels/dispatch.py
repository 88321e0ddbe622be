"""What every kernel's front door shares: its reference, autocast, and who answers: the reference, PyTorch or Triton."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from mep_lightning.errors import reason

SWITCH = "MEP_KERNELS"
"""Environment variable: `auto` (the default), `torch` to leave Triton alone, `triton` to take it wherever it runs."""
LEAST_CAPABILITY = (8, 0)

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol[P, R]):
    """A function with its definition in plain PyTorch as `.reference`; both take the same arguments."""

    reference: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def defined_by(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Decorate a kernel's Python function with the reference that defines it.

    Tensors with a `__torch_function__` of their own are asked first, as by torch's functions.
    """

    def attach(function: Callable[P, R]) -> Kernel[P, R]:
        kernel = cast(Kernel[P, R], overridable(function))
        kernel.reference = reference
        return kernel

    return attach


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Let tensors that override torch's functions override this one as well."""

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args):
            return handle_torch_function(public, args, *args, **kwargs)
        return function(*args, **kwargs)

    return public


def launches(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what launches Triton's kernels: they run where the first tensor lies, whichever GPU is the current."""

    @functools.wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((one for one in args if isinstance(one, Tensor)), None)
        if tensor is None or not tensor.is_cuda:
            return function(*args, **kwargs)
        with torch.cuda.device_of(tensor):
            return function(*args, **kwargs)

    return there


def needs_reference() -> bool:
    """Whether forward-mode AD or a `torch.func` transform is at work.

    A custom op knows reverse mode only: its tangent would silently be zero, and `vmap` would refuse it.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def needs_op(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its custom op: to be traced as a whole, or to have a gradient of its own.

    Otherwise the op's body may run as it is, which spares a CPU the op's dispatch, about a tenth of a ZOODiP forward of
    `tiny` (1.12 times as fast on one core).
    """
    if torch.compiler.is_compiling() or isinstance(tensors[0], FakeTensor):
        return True
    return asks_gradient(*tensors)


def asks_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what happens to any of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call is for its numbers alone: nobody traces, transforms or differentiates it."""
    return not (torch.compiler.is_compiling() or asks_gradient(*tensors) or needs_reference())


def autocast_activation(x: Tensor) -> Tensor:
    """Cast an activation as autocast does before a built-in linear or convolution; weights and scales stay."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def runs_triton(tensor: Tensor, rival: bool = False) -> bool:
    """Whether Triton answers for a tensor: it holds numbers and lies on a GPU where Triton works.

    Args:
        tensor: what the operation works on.
        rival: whether a library has a kernel for the same; Triton then answers only where MEP_KERNELS says so.
    """
    wanted = not rival or os.environ.get(SWITCH) == "triton"
    if torch.compiler.is_compiling():  # traced code meets custom ops, whose bodies ask again
        return False
    on_gpu = tensor.is_cuda and not isinstance(tensor, FakeTensor)
    return on_gpu and wanted and why_not_triton(tensor.device.index or 0) is None


@functools.cache
def why_not_triton(index: int = 0) -> str | None:
    """Why Triton's kernels do not run on a CUDA device, in a few words with the mend; None where they do."""
    if os.environ.get(SWITCH, "auto") == "torch":
        return f"switched off by {SWITCH}=torch"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and they need 8.0 or more"
    try:
        philox = importlib.import_module("mep_lightning.kernels.philox.triton")
        with torch.cuda.device(index):
            philox.philox_normal(0, 0, [0], 0, torch.empty(1, 4, device="cuda"))
            torch.cuda.synchronize()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    except Exception as error:  # a broken Triton fails in many ways: no compiler, another driver, another Python
        return f"Triton cannot compile here ({reason(error)})"
    return None
