"""What all quantised layers share, whatever their weight is packed as: who may cast it, and how it is loaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

Pair = tuple[int, int]
PORTION = 2**22
"""Weights that are packed at once, which takes several times their bytes."""
ROWS = 64
"""A portion has so many rows, or a multiple: no block of weights that share a scale lies in two."""


class QuantizedWeight(nn.Module):
    """A frozen weight in buffers that no cast of a module reaches.

    They are buffers because the base is frozen: `parameters()` then holds floating point only, as libraries expect that
    read a model's dtype from it or switch `requires_grad` for all. A scale may be trained: it is a leaf like any other.

    Attributes:
        packed: the names of those buffers; the first is "weight".
        weight_shape: of the weight in floating point, [O, ...].
    """

    packed: ClassVar[tuple[str, ...]]
    weight: Tensor
    weight_shape: torch.Size

    @abstractmethod
    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A float weight [O, ...] as what the buffers in `packed` hold."""

    @abstractmethod
    def empty(self, shape: torch.Size, device: Any) -> tuple[Tensor, ...]:
        """Those buffers before a weight is there."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, ...] in floating point."""

    def _declare(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Replace the float weight that the parent class declared on the meta device."""
        self.weight_shape = self.weight.shape
        del self.weight
        for name, value in zip(self.packed, self.empty(self.weight_shape, device), strict=True):
            self.register_buffer(name, value)
        values = nn.Parameter(torch.zeros(self.weight_shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)

    def quantize_(self, weight: Tensor, device: torch.device | None = None) -> Self:
        """Take a float weight [O, ...] and hold it packed, a portion of rows after the other; returns the layer.

        Args:
            weight: of the layer's shape.
            device: where it is packed and stays; by default the weight's own.

        Raises:
            ValueError: it has another shape.
        """
        if weight.shape != self.weight_shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, but the layer has {tuple(self.weight_shape)}")
        device = device or weight.device
        held = self.empty(self.weight_shape, device)
        done = [0] * len(held)
        for rows in weight.detach().split(max(PORTION // weight[0].numel() // ROWS, 1) * ROWS):
            for i, part in enumerate(self.pack(rows.to(device))):
                held[i][done[i] : done[i] + len(part)] = part
                done[i] += len(part)
        for name, value in zip(self.packed, held, strict=True):
            setattr(self, name, value)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow every move, refuse every cast: `.to(bfloat16)` means the activations and the bias."""
        kept = [getattr(self, name) for name in self.packed]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            casts = moved.dtype != tensor.dtype and any(tensor is one for one in kept)
            return tensor.to(moved.device) if casts else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A float checkpoint is quantised on the way in; copied into integers it would silently be truncated."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.is_floating_point():
            for name, value in zip(self.packed, self.pack(weight), strict=True):
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _refuse_integers(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} got {x.dtype} activations: whoever calls it casts them to `weight.dtype`, "
                "which is an integer's here; leave this layer in floating point"
            )


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """`nn.Linear` with a packed weight; activations keep their dtype, and the arithmetic follows them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device="meta")
        self._declare(bias, device, dtype)

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Self:
        """Quantise a float layer; its bias is taken over, not copied."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.bias = linear.bias
        return layer.quantize_(linear.weight).train(linear.training)


class QuantizedConv2d(QuantizedWeight, nn.Conv2d):
    """`nn.Conv2d` with a packed weight: zero padding, no dilation, no groups."""

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
        self._declare(bias, device, dtype)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a float convolution is of the kind this layer computes."""
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return plain and conv.groups == 1 and conv.dilation == (1, 1)

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> Self:
        """Quantise a float layer; its bias is taken over, not copied.

        Raises:
            ValueError: the convolution is dilated, grouped, or padded other than with a number of zeros.
        """
        if not cls.fits(conv):
            name = cls.__name__
            raise ValueError(f"{conv} is dilated, grouped or not padded with zeros, which {name} does not compute")
        shape = (cast(Pair, conv.kernel_size), cast(Pair, conv.stride), cast(Pair, conv.padding))
        layer = cls(conv.in_channels, conv.out_channels, *shape, bias=False, device="meta")
        layer.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        return layer.quantize_(conv.weight).train(conv.training)
