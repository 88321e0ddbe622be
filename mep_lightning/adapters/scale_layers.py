"""int8 layers whose scales are trained, per output channel and, where asked for, per input channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep_lightning.estimators.perturbation import HERE, Members
from mep_lightning.kernels import int8_conv2d, int8_linear, int8_linear_w8a8
from mep_lightning.kernels.dispatch import asks_gradient, autocast_activation
from mep_lightning.kernels.int8_conv2d import gradients as conv_gradients
from mep_lightning.kernels.int8_linear import gradients as linear_gradients
from mep_lightning.quantization import Int8Conv2d, Int8Linear


@dataclass
class Standing:
    """What all layers of an adapter read when they compute.

    Attributes:
        members: who asks; their rows lie one after the other.
        is_away: whether the scales that the base came with are used.
    """

    members: Members = HERE
    is_away: bool = False


@dataclass
class Scales:
    """What a layer computes with instead of its own scale. (A plain object: the base must not own what is trained.)

    Attributes:
        standing: of the adapter.
        output: fp32 [O].
        input: fp32 [I], or None.
        ids: their parameter ids.
    """

    standing: Standing
    output: Tensor
    input: Tensor | None
    ids: tuple[int, int]


class ScaledLayer:
    """W = s_out q s_in. Integers and bias are the layer's own, which becomes one of these and a plain one again."""

    plain: ClassVar[type[torch.nn.Module]]
    """What it is when no scale of its is trained."""
    channels: ClassVar[int]
    """The dimension of channels, from the end."""
    scales: Scales
    weight: Tensor
    scale: Tensor
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """x with I channels -> as many rows with O channels, member-major."""
        standing = self.scales.standing
        if standing.is_away:
            return super().forward(x)  # type: ignore[misc]
        if standing.members.is_alone:
            return self._trained(autocast_activation(x))
        return self._of_members(x, standing.members)

    def _trained(self, x: Tensor) -> Tensor:
        into, out = self.scales.input, self.scales.output
        if into is None:
            return self.product(x, out, self.bias)
        if not asks_gradient(x, into, out):
            return self.product(x * self.along(into.to(x.dtype)), out, self.bias)
        return _InputScaled.apply(x, into, self.weight, out, self)

    def _of_members(self, x: Tensor, members: Members) -> Tensor:
        """One product with the base's own scales for all of them, and the ratio of each one's to those."""
        count = len(members)
        ratio = members.of(self.scales.output, self.scales.ids[0]) / self.scale
        if self.scales.input is not None:
            x = self._times(x, members.of(self.scales.input, self.scales.ids[1]), count)
        y = self._times(self.product(x, self.scale, None), ratio, count)
        return y if self.bias is None else y + self.along(self.bias.to(y.dtype))

    def _times(self, x: Tensor, factors: Tensor, count: int) -> Tensor:
        """Rows of V members by each one's factors [V, C]."""
        factors = self.along(factors.to(x.dtype))
        if count == 1:  # one member, whose factors may have tangents
            return x * factors[0]
        rows = x.unflatten(0, (count, -1))
        return (rows * factors.view(count, *(1,) * (rows.dim() - factors.dim()), *factors.shape[1:])).flatten(0, 1)

    def along(self, factors: Tensor) -> Tensor:
        """Factors [..., C] along the dimension of channels."""
        return factors if self.channels == -1 else factors[..., None, None]

    def product(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """With the integers."""
        raise NotImplementedError

    def gradients(self, grad: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The product's, of x and scale."""
        raise NotImplementedError


class ScaledInt8Linear(ScaledLayer, Int8Linear):
    """x [..., I] -> [..., O]."""

    plain, channels = Int8Linear, -1

    def product(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        run = int8_linear_w8a8 if self.multiplies_integers else int8_linear
        return run(x, self.weight, scale, bias)

    def gradients(self, grad: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return linear_gradients(grad, x, q, scale)


class ScaledInt8Conv2d(ScaledLayer, Int8Conv2d):
    """x [B, I, H, W] -> [B, O, H', W']."""

    plain, channels = Int8Conv2d, -3

    def product(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return int8_conv2d(x, self.weight, scale, bias, self.stride, self.padding)

    def gradients(self, grad: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return conv_gradients(grad, x, q, scale, self.stride, self.padding)


class _InputScaled(torch.autograd.Function):
    """x s_in, then the product; of the two x alone is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, q: Tensor, out: Tensor, layer: ScaledLayer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, into, q, out)
        return layer.product(x * layer.along(into.to(x.dtype)), out, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, into, q, out = ctx.saved_tensors
        factors = ctx.layer.along(into.to(x.dtype))
        grad_scaled, grad_out = ctx.layer.gradients(grads[0], x * factors, q, out)
        rows = (grad_scaled * x).transpose(ctx.layer.channels, -1).reshape(-1, len(into))
        grad_into = rows.sum(0, dtype=into.dtype)
        grad_x = grad_scaled.mul_(factors) if ctx.needs_input_grad[0] else None
        return grad_x, grad_into, None, grad_out, None


KINDS: dict[type[torch.nn.Module], type[ScaledLayer]] = {
    kind.plain: kind for kind in (ScaledInt8Linear, ScaledInt8Conv2d)
}
"""Which layer becomes which."""
