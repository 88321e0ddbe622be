"""Sums, products, reductions and the derivatives of functions of one number."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mep_lightning import kernels
from mep_lightning.kernels.pointwise_tangents import fuses
from mep_lightning.kernels.stacks import room
from mep_lightning.tangents.dual import Dual, NoRuleError, aligned, rule
from mep_lightning.tangents.structure import _dim


def _dims(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else 0


def _parts(x: Any, dims: int) -> tuple[Any, Tensor | None]:
    """Value and tangents (None where there are none), ready to broadcast with others of `dims` dimensions."""
    if not isinstance(x, Dual):
        return x, None
    stack = aligned(x.stack, dims)
    return stack[0], stack[1:]


def joined(value: Tensor, tangents: Tensor) -> Dual:
    """A value and tangents, computed apart, as one; tangents may have been left as small as broadcasting lets them."""
    stack = room(value, len(tangents))
    stack[0] = value
    stack[1:] = tangents
    return Dual(stack)


def _promoted(x: Any, y: Any) -> tuple[Any, Any]:
    """Both in the dtype that torch gives their values' result: one without dimensions counts as a number there."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.dtype == y.dtype:
        return x, y
    a, b = (z.value if isinstance(z, Dual) else z for z in (x, y))
    common = torch.result_type(a, b)
    return tuple(Dual(z.stack.to(common)) if isinstance(z, Dual) else z.to(common) for z in (x, y))  # type: ignore


def _sum(x: Any, y: Any, sign: float) -> Dual:
    """x + sign * y."""
    dims = max(_dims(x), _dims(y))
    x, y = _promoted(x, y)
    (a, da), (b, db) = _parts(x, dims), _parts(y, dims)
    if da is not None and db is not None:
        return Dual(torch.add(aligned(x.stack, dims), aligned(y.stack, dims), alpha=sign))
    value = a + sign * b if sign != 1 else a + b
    tangents: Any = db if da is None else da
    return joined(value, tangents * sign if da is None and sign != 1 else tangents)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(x: Any, other: Any, *, alpha: float = 1) -> Dual:
    return _sum(x, other, alpha)


@rule(Tensor.add_, Tensor.__iadd__)
def _add_(x: Any, other: Any, *, alpha: float = 1) -> Dual:
    if not isinstance(x, Dual):
        raise NoRuleError("a tensor without tangents cannot take some in place: write x = x + y")
    if isinstance(other, Dual):
        x.stack.add_(aligned(other.stack, x.dim()), alpha=alpha)
    else:
        x.stack[0].add_(other, alpha=alpha)
    return x


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def _sub(x: Any, other: Any, *, alpha: float = 1) -> Dual:
    return _sum(x, other, -alpha)


@rule(torch.rsub, Tensor.__rsub__)
def _rsub(x: Any, other: Any, *, alpha: float = 1) -> Dual:
    return _sum(other, x, -alpha)


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(x: Any, other: Any) -> Dual:
    dims = max(_dims(x), _dims(other))
    x, other = _promoted(x, other)
    (a, da), (b, db) = _parts(x, dims), _parts(other, dims)
    if da is None or db is None:
        dual, plain = (x, other) if db is None else (other, x)
        return Dual(aligned(dual.stack, dims) * plain)
    if fuses(x.stack, other.stack):
        return Dual(kernels.product_tangents(x.stack, other.stack))
    value = a * b
    stack = room(value, len(da))
    stack[0].copy_(value)
    torch.mul(da, b, out=stack[1:]).addcmul_(db, a)
    return Dual(stack)


@rule(torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__)
def _div(x: Any, other: Any) -> Dual:
    """q = x / y; dq = (dx - q dy) / y, which overflows no sooner than q itself."""
    dims = max(_dims(x), _dims(other))
    x, other = _promoted(x, other)
    if not isinstance(other, Dual):
        return Dual(aligned(x.stack, dims) / other)
    (a, da), (b, db) = _parts(x, dims), _parts(other, dims)
    value = a / b
    moved: Any = -value * db if da is None else da - value * db
    return joined(value, moved / b)


@rule(Tensor.__rtruediv__)
def _rdiv(x: Any, y: Any) -> Dual:
    return _div(y, x)


@rule(torch.reciprocal, Tensor.reciprocal)
def _reciprocal(x: Dual) -> Dual:
    return _div(1, x)


@rule(Tensor.mul_, Tensor.__imul__)
def _mul_(x: Any, other: Any) -> Dual:
    if not isinstance(x, Dual):
        raise NoRuleError("a tensor without tangents cannot take some in place: write x = x * y")
    x.stack.copy_(_mul(x, other).stack)
    return x


@rule(torch.neg, Tensor.neg, Tensor.__neg__)
def _neg(x: Dual) -> Dual:
    return Dual(-x.stack)


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def _pow(x: Any, exponent: Any) -> Dual:
    if not isinstance(x, Dual) or isinstance(exponent, Tensor):
        raise NoRuleError("a power of a tensor with tangents has a number as its exponent")
    return chained(x, lambda y: (y**exponent, exponent * y ** (exponent - 1) if exponent else torch.zeros_like(y)))


AT_ONCE = {"cpu": 2**18, "cuda": 2**22}
"""Values whose function and slope are worked out together, in fp32: what stays in a CPU's caches, and 16 MiB on a GPU,
where every portion is launches more."""


def chained(x: Dual, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Dual:
    """f(x) by the chain rule: its value, and its slope times the tangents; both in fp32 at least, and rounded once.

    (Slopes in bf16 would be most of what bf16's tangents err by.)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    stack = room(x.value, len(x.stack) - 1)
    for source, target in _portions(x.stack, stack):
        value, slope = function(source[0].to(wide))
        target[0].copy_(value)
        target[1:].copy_(source[1:] * slope)
    return Dual(stack)


def _portions(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two stacks' values in portions of rows, or all at once where what is worked out takes no more than they do."""
    at_once = AT_ONCE.get(source.device.type, AT_ONCE["cpu"])
    if source.dtype.itemsize >= 4 or source[0].numel() <= at_once:
        yield source, target
        return
    longest = max(range(1, source.dim()), key=lambda dim: source.shape[dim])
    count = max(at_once * source.shape[longest] // source[0].numel(), 1)
    yield from zip(source.split(count, longest), target.split(count, longest), strict=True)


def _gelu(x: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    if approximate == "none":
        share = torch.special.ndtr(x)
        return x * share, share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    near = x.clamp(-30, 30)  # beyond it is x or 0, and fp16 would overflow
    inner = math.sqrt(2 / math.pi) * (near + 0.044715 * near**3)
    bent = torch.tanh(inner)
    bend = (1 - bent * bent) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * near * near)
    return 0.5 * x * (1 + bent), 0.5 * (1 + bent) + 0.5 * near * bend


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(x)
    return y, y * (1 - y)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.exp(x)
    return y, y


def _sqrt(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.sqrt(x)
    return y, 0.5 / y


FUNCTIONS: list[tuple[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]]] = [
    ((torch.exp, Tensor.exp), _exp),
    ((torch.log, Tensor.log), lambda x: (torch.log(x), 1 / x)),
    ((torch.sin, Tensor.sin), lambda x: (torch.sin(x), torch.cos(x))),
    ((torch.cos, Tensor.cos), lambda x: (torch.cos(x), -torch.sin(x))),
    ((torch.tanh, Tensor.tanh), _tanh),
    ((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _sigmoid),
    ((torch.sqrt, Tensor.sqrt), _sqrt),
    ((torch.abs, Tensor.abs, Tensor.__abs__), lambda x: (x.abs(), x.sign())),
    ((torch.square, Tensor.square), lambda x: (x * x, 2 * x)),
    ((torch.relu, Tensor.relu, F.relu), lambda x: (x.relu(), (x > 0).to(x.dtype))),
    ((F.gelu,), _gelu),
    ((F.silu,), _silu),
]
"""Functions of one number: what computes their value and their slope."""
FUSED: dict[Any, str] = {_silu: "silu", _gelu: "gelu"}
"""Those that have a kernel of their own, without further settings."""


def _through(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Dual]:
    known = set(inspect.signature(function).parameters)

    def run(x: Dual, *, inplace: bool = False, **given: Any) -> Dual:
        if not known.issuperset(given):
            raise NoRuleError(f"{', '.join(given)} of {function.__name__} has no rule for tangents")
        fused = FUSED.get(function) if set(given.values()) <= {"none"} and fuses(x.stack) else None
        found = Dual(kernels.activation_tangents(x.stack, fused)) if fused else chained(x, partial(function, **given))
        if not inplace:
            return found
        x.stack.copy_(found.stack)
        return x

    return run


for _replaced, _function in FUNCTIONS:
    rule(*_replaced)(_through(_function))


rule(kernels.geglu)(kernels.geglu.reference)


@rule(torch.clamp, Tensor.clamp)
def _clamp(x: Dual, min: Any = None, max: Any = None) -> Dual:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise NoRuleError("a clamp of a tensor with tangents has numbers as its bounds")
    return chained(x, lambda y: (y.clamp(min, max), (y.clamp(min, max) == y).to(y.dtype)))


@rule(F.mse_loss)
def _mse_loss(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None
) -> Any:
    if not (size_average is None and reduce is None and weight is None):
        raise NoRuleError("mse_loss with weights, or told by other words than reduction, has no rule for tangents")
    errors = torch.square(_sum(input, target, -1))
    return errors if reduction == "none" else errors.mean() if reduction == "mean" else errors.sum()


@rule(F.dropout)
def _dropout(x: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if p and training:
        raise NoRuleError("dropout draws anew in every pass, and tangents need one: set the model to eval")
    return x


# -- reductions --------------------------------------------------------------------------------------------------------


def _over(x: Dual, dim: Any) -> Any:
    """Which dimensions of a stack: those that are given, or all of the value's."""
    if dim is None or dim == ():
        return tuple(range(1, x.stack.dim()))
    return _dim(dim) if isinstance(dim, int) else tuple(map(_dim, dim))


@rule(torch.sum, Tensor.sum)
def _total(x: Dual, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Dual:
    over = _over(x, dim)
    return Dual(x.stack.sum(over, keepdim, dtype=dtype) if over != () else x.stack.to(dtype or x.dtype))


@rule(torch.mean, Tensor.mean)
def _mean(x: Dual, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Dual:
    over = _over(x, dim)
    return Dual(x.stack.mean(over, keepdim, dtype=dtype) if over != () else x.stack.to(dtype or x.dtype))
