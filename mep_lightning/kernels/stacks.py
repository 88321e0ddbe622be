"""How a value and its tangents lie in memory: one stack, the value first, each in the value's own order."""

from __future__ import annotations

import torch
from torch import Tensor


def room(value: Tensor, tangents: int) -> Tensor:
    """Room for a value like this one and for its tangents, [1 + n, *shape], channels last where it is."""
    stack = torch.empty(1 + tangents, *value.shape, dtype=value.dtype, device=value.device)
    return _channels_first(stack) if is_channels_last(value) else stack


def is_channels_last(value: Tensor) -> bool:
    """Whether a value is an image whose channels lie beside one another."""
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)


def _channels_first(stack: Tensor) -> Tensor:
    """The same memory as images with channels last: [1 + n, B, C, H, W]."""
    count, batch, channels, height, width = stack.shape
    return stack.view(count, batch, height, width, channels).permute(0, 1, 4, 2, 3)


def as_rows(stack: Tensor) -> Tensor | None:
    """A view [1 + n, rows, length] in the order of memory whose rows are dense; None where there is none.

    A stack whose values are dense is one row each; a part of wider rows, as `chunk` gives, keeps its rows.
    """
    if is_channels_last(stack[0]):
        stack = stack.permute(0, 1, 3, 4, 2)
    if stack[0].is_contiguous():
        return stack.flatten(1)[:, None] if stack.dim() > 1 else stack[:, None, None]
    if stack.dim() < 3 or stack.stride(-1) != 1:
        return None
    try:
        return stack.view(len(stack), -1, stack.shape[-1])
    except RuntimeError:  # rows that do not follow one another evenly
        return None
