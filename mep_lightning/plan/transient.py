"""What an operation holds only while it runs: bytes that a rehearsal sees no tensor of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mep_lightning.kernels.int8_conv2d import PORTION
from mep_lightning.kernels.products import onednn_knows


def transient(operation: Any, args: tuple[Any, ...], on_cpu: bool = False) -> int:
    """Bytes that an operation holds only while it runs.

    Our own hold the dequantised weight. On a CPU oneDNN brings every convolution's weight into an order of its own, and
    where it has none in half precision, PyTorch's own lay patches side by side.
    """
    name = str(operation)
    if name.startswith("mep_lightning.int8_linear_w8a8."):
        rows, outputs = args[0].numel() // args[0].shape[-1], args[1].shape[0]
        return args[0].numel() + (8 * rows * outputs if on_cpu else 0)  # rows of int8; sums of int32, scaled in fp32
    if name.startswith("mep_lightning.int8_linear."):
        return args[1].numel() * args[0].element_size()
    if name.startswith("mep_lightning.int8_conv2d."):
        x, q, _, _, stride, padding = args
        weight = q.numel() * x.element_size()
        if not on_cpu:
            return weight
        portion = min(weight, PORTION)
        return 2 * portion if onednn_knows(x.dtype) else portion + unfolded(x, q, stride, padding)
    if name.startswith("aten.convolution.") and on_cpu:
        x, weight, _, stride, padding, *_ = args
        return weight.numel() * weight.element_size() if onednn_knows(x.dtype) else unfolded(x, weight, stride, padding)
    return 0


def unfolded(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """Bytes of a convolution's patches of x [N, C, H, W], laid side by side; one of 1 x 1 needs none."""
    kernel = weight.shape[2:]
    if all(side == 1 for side in (*kernel, *stride)) and not any(padding):
        return 0
    sides = zip(x.shape[2:], kernel, stride, padding, strict=True)
    places = math.prod((size + 2 * pad - side) // step + 1 for size, side, step, pad in sides)
    return x.shape[0] * x.shape[1] * math.prod(kernel) * places * x.element_size()
