"""Functions of one number, products, and their tangents: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def activation_tangents(x: Tensor, function: str) -> Tensor:
    """y = f(x), dy = f'(x) dx; x [1 + n, *shape], the value first -> the same."""
    value = x[0]
    if function == "silu":
        gate = torch.sigmoid(value)
        slope = gate * (1 + value * (1 - gate))
        return torch.cat([F.silu(value)[None], slope * x[1:]])
    share = torch.special.ndtr(value)
    slope = share + value * torch.exp(-0.5 * value * value) / math.sqrt(2 * math.pi)
    return torch.cat([F.gelu(value)[None], slope * x[1:]])


def product_tangents(x: Tensor, y: Tensor) -> Tensor:
    """z = x y, dz = dx y + x dy; x and y [1 + n, *shape] -> the same."""
    return torch.cat([(x[0] * y[0])[None], x[1:] * y[0] + x[0] * y[1:]])
