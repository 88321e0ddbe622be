"""How a frozen base computes: through our kernels, in blocks of rows, images in the memory format that they have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from mep_lightning.bases.bands import BANDED
from mep_lightning.kernels import attention, geglu, group_norm
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


class Gate(GEGLU):
    """diffusers' gated layer in one pass over what it projects."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., C] -> [..., D]."""
        return geglu(self.proj(hidden_states))


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, which leaves channels last where they are."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, *pixels] -> the same."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Transformer(Transformer2DModel):
    """diffusers' transformer of images, which leaves channels last where they are."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """hidden_states [B, H W, C'] -> [B, C, H, W]."""
        last = residual.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return (image if self.use_linear_projection else self.proj_out(image)) + residual


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    FeedForward: BlockwiseFeedForward,
    GEGLU: Gate,
    nn.GroupNorm: GroupNorm,
    Transformer2DModel: Transformer,
}
"""What computes as ours does; a module's tensors and their names stay."""


def compute_frugally_(module: nn.Module) -> None:
    """Let a U-Net's or an autoencoder's layers compute as ours do."""
    if isinstance(module, UNet2DConditionModel):
        module.set_attn_processor(AttentionProcessor())
    replaced = REPLACED | BANDED if isinstance(module, AutoencoderKL) else REPLACED
    for part in module.modules():
        ours = replaced.get(type(part))
        if ours is not None and not (isinstance(part, FeedForward) and not isinstance(part.net[-1], nn.Linear)):
            part.__class__ = ours
