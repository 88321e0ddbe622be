"""Attention and its tangents: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O = P v, P = softmax(S), S = q k' / sqrt(D); dO = P dv + P (dS - rowsum(P dS)) v, dS = (dq k' + q dk') / sqrt(D).

    q [1 + n, B, H, S, D], k and v [1 + n, B, H, T, D], values first -> [1 + n, B, H, S, D].
    """
    root = math.sqrt(q.shape[-1])
    share = (q[0] @ k[0].mT / root).softmax(-1)  # [B, H, S, T]
    moved = share * (q[1:] @ k[0].mT + q[0] @ k[1:].mT) / root
    moved = moved - share * moved.sum(-1, keepdim=True)
    return torch.cat([(share @ v[0])[None], share @ v[1:] + moved @ v[0]])
