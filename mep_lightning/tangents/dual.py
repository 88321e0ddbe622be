"""A value and its derivatives along n directions, computed together in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mep_lightning.errors import UserError
from mep_lightning.kernels.stacks import room

Rule = Callable[..., Any]


class NoRuleError(NotImplementedError, UserError):
    """Something is computed of tangents whose derivative is not known here."""


RULES: dict[Any, Rule] = {}
"""What is computed in the place of every function of torch or of our kernels that a `Dual` may meet."""
PLAIN: set[Any] = set()
"""What asks for shapes, dtypes and places alone, which are the value's."""


class Dual(Tensor):
    """A tensor whose derivatives along n directions go with it through a model (forward-mode differentiation).

    It stands for the value alone: shapes and indices are the value's, and a model need not know. Value and tangents lie
    in one stack, so that a linear layer or a convolution is one product with one weight for all of them. What is not a
    `Dual` has no tangent and is computed once.

    A function without a rule is refused, whatever its arguments: a tangent is never dropped silently.

    Args:
        stack: [1 + n, *shape], the value first.

    Attributes:
        stack: as given.
    """

    stack: Tensor

    @staticmethod
    def __new__(cls, stack: Tensor) -> Dual:
        if stack.requires_grad:
            raise NoRuleError("tangents are carried without a backward pass: call the model under torch.no_grad()")
        value = stack[0]
        dual = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=stack.dtype, device=stack.device
        )
        dual.stack = stack
        return dual

    @property
    def value(self) -> Tensor:
        """[*shape]."""
        return self.stack[0]

    @property
    def tangents(self) -> Tensor:
        """[n, *shape]."""
        return self.stack[1:]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule, given = RULES.get(func), kwargs or {}
        if rule is not None:
            try:
                return rule(*args, **given)
            except TypeError as error:
                if not _takes(rule, args, given):
                    raise NoRuleError(f"{_named(func)} is called in a way that has no rule for tangents") from error
                raise
        if func in PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NoRuleError(f"{_named(func)} has no rule for tangents: {HOW_TO_MEND}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Whatever came past the rules."""
        raise NoRuleError(f"{func} has no rule for tangents: {HOW_TO_MEND}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Dual({self.value!r}, {len(self.stack) - 1} tangents)"


HOW_TO_MEND = "use a finite difference (RandomGradientEstimator), or give it one with tangents.rule"


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorate what is computed, of arguments some of which are `Dual`, in the place of these functions."""

    def add(function: Rule) -> Rule:
        for replaced in functions:
            RULES[replaced] = function
        return function

    return add


def _takes(rule: Rule, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(rule).bind(*args, **given)
    except TypeError:
        return False
    return True


def _named(function: Any) -> str:
    if getattr(function, "__name__", "") in ("__get__", "__set__"):  # of a property, such as Tensor.T
        function = function.__self__
    owner = getattr(function, "__objclass__", None) or getattr(function, "__module__", None)
    name = getattr(function, "__name__", repr(function))
    return f"{getattr(owner, '__name__', owner)}.{name}"


def stacked(x: Any, like: Tensor) -> Tensor:
    """The stack of anything: of what has no tangents, with zeros as many as `like`, a stack, has."""
    if isinstance(x, Dual):
        return x.stack
    value = x if isinstance(x, Tensor) else like.new_full((), x)  # (a copy from the host would end a graph's capture)
    stack = room(value, len(like) - 1).zero_()
    stack[0] = value
    return stack


def aligned(stack: Tensor, dims: int) -> Tensor:
    """A stack whose entries have so many dimensions that they broadcast with others of as many."""
    missing = dims - (stack.dim() - 1)
    return stack.reshape(len(stack), *(1,) * missing, *stack.shape[1:]) if missing > 0 else stack


for _attribute in ("shape", "dtype", "device", "is_cuda", "is_cpu", "ndim", "requires_grad", "layout", "is_meta"):
    PLAIN.add(getattr(Tensor, _attribute).__get__)
PLAIN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex}
PLAIN |= {Tensor.element_size, Tensor.get_device, Tensor.stride, Tensor.nelement, torch.is_floating_point}
PLAIN |= {torch.numel, torch.is_complex}
