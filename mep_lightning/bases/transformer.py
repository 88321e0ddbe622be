"""How a frozen U-Net's transformers compute: attention through our kernel, feed-forward layers in blocks of rows."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from mep_lightning.kernels import attention
from mep_lightning.kernels.dispatch import needs_reference
from mep_lightning.tangents import Dual

HIDDEN = 2**22
"""Hidden values of a feed-forward layer at a time. Fewer save more memory, and dequantise its weights more often."""


class AttentionProcessor(AttnProcessor2_0):
    """`kernels.attention` in the plain self- and cross-attentions of a U-Net; diffusers' own way in all others."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, S, C] (and encoder_hidden_states [B, T, D]) -> [B, S, C]."""
        if attention_mask is not None or hidden_states.dim() != 3 or not _is_plain(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, H, S, C / H]
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        projection, dropout = attn.to_out
        return dropout(projection(attention(q, k, v).transpose(1, 2).flatten(2)))


def _is_plain(attn: Attention) -> bool:
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.residual_connection)
    return not any(extras) and attn.rescale_output_factor == 1 and attn.to_out is not None


class BlockwiseFeedForward(FeedForward):
    """diffusers' feed-forward layer without its whole hidden layer in memory, where no gradient is asked for.

    At SD1.5's 512 px that of three members takes 30 MiB in half precision, and twice as much before its gate.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., C] -> [..., C]."""
        rows = hidden_states.flatten(0, -2)  # [N, C]
        carried = len(rows.stack) if isinstance(rows, Dual) else 1  # of each row its tangents too
        at_once = max(HIDDEN // (carried * self.net[-1].in_features), 1)
        if len(rows) <= at_once or torch.is_grad_enabled() or needs_reference():
            return super().forward(hidden_states, *args, **kwargs)
        return torch.cat([FeedForward.forward(self, block) for block in rows.split(at_once)]).view_as(hidden_states)


def compute_frugally_(unet: UNet2DConditionModel) -> None:
    """Let a U-Net's attentions and feed-forward layers compute as ours do; its modules and their names stay."""
    unet.set_attn_processor(AttentionProcessor())
    for part in unet.modules():
        if type(part) is FeedForward and isinstance(part.net[-1], torch.nn.Linear):
            part.__class__ = BlockwiseFeedForward
