"""What every kernel's front door shares: its reference, autocast, and when the reference itself must answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol[P, R]):
    """A function with its definition in plain PyTorch as `.reference`; both take the same arguments."""

    reference: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def defined_by(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Decorate a kernel's Python function with the reference that defines it."""

    def attach(function: Callable[P, R]) -> Kernel[P, R]:
        kernel = cast(Kernel[P, R], function)
        kernel.reference = reference
        return kernel

    return attach


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
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocast_activation(x: Tensor) -> Tensor:
    """Cast an activation as autocast does before a built-in linear or convolution; weights and scales stay."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
