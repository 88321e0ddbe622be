"""Symmetric int8 weights, one scale an output channel: the quantiser and the layers that hold its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mep_lightning.kernels import int8_conv2d, int8_linear, quantize_rows
from mep_lightning.kernels.dequantize import dequantize_reference

Pair = tuple[int, int]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise by the largest magnitude of each output channel; the error is at most half a scale.

    Args:
        weight: [O, ...], any floating dtype; the arithmetic is fp32.

    Returns:
        q int8 [O, ...] in [-127, 127], scale fp32 [O] (1 for a channel of zeros), with weight ~ q * scale.
    """
    return quantize_rows(weight)


class Int8Weight(nn.Module):
    """What both layers share: an int8 `weight` and an fp32 `scale`, both buffers, which no cast of a module reaches.

    They are buffers because the base is frozen: `parameters()` then holds floating point only, as libraries expect that
    read a model's dtype from it or switch `requires_grad` for all. A scale may be trained: it is a leaf like any other.
    """

    weight: Tensor
    scale: Tensor

    def _empty(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Replace the float weight that the parent class declared on the meta device."""
        shape = self.weight.shape
        del self.weight
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(shape[0], dtype=torch.float32, device=device))
        values = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)

    def quantize_(self, weight: Tensor) -> Self:
        """Take a float weight [O, ...], on the weight's own device, and hold it in int8; returns the layer."""
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, but the layer has {tuple(self.weight.shape)}")
        self.weight, self.scale = quantize_int8(weight)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, ...] in floating point, differentiable in the scale."""
        return dequantize_reference(self.weight, self.scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow every move, refuse every cast: `.to(bfloat16)` means the activations and the bias."""
        kept = (self.weight, self.scale)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype and any(tensor is one for one in kept)
            return tensor.to(moved.device) if cast else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A float checkpoint is quantised on the way in; copied into int8 it would silently be truncated."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.is_floating_point():
            state_dict[prefix + "weight"], state_dict[prefix + "scale"] = quantize_int8(weight)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _refuse_integers(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} got {x.dtype} activations: whoever calls it casts them to `weight.dtype`, "
                "which is int8 here; leave this layer in floating point"
            )


class Int8Linear(Int8Weight, nn.Linear):
    """`nn.Linear` with its weight in int8; activations keep their dtype, and the arithmetic follows them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device="meta")
        self._empty(bias, device, dtype)

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a float layer; its bias is taken over, not copied."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.bias = linear.bias
        return layer.quantize_(linear.weight).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        self._refuse_integers(x)
        return int8_linear(x, self.weight, self.scale, self.bias)


class Int8Conv2d(Int8Weight, nn.Conv2d):
    """`nn.Conv2d` with its weight in int8: zero padding, no dilation, no groups."""

    stride: Pair
    padding: Pair

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, bias=False, device="meta")
        self._empty(bias, device, dtype)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a float convolution is of the kind this layer computes."""
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return plain and conv.groups == 1 and conv.dilation == (1, 1)

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> Int8Conv2d:
        """Quantise a float layer; its bias is taken over, not copied.

        Raises:
            ValueError: the convolution is dilated, grouped, or padded other than with a number of zeros.
        """
        if not cls.fits(conv):
            raise ValueError(f"{conv} is dilated, grouped or not padded with zeros, which Int8Conv2d does not compute")
        shape = (cast(Pair, conv.kernel_size), cast(Pair, conv.stride), cast(Pair, conv.padding))
        layer = cls(conv.in_channels, conv.out_channels, *shape, bias=False, device="meta")
        layer.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        return layer.quantize_(conv.weight).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, I, H, W] -> [B, O, H', W']."""
        self._refuse_integers(x)
        return int8_conv2d(x, self.weight, self.scale, self.bias, self.stride, self.padding)
