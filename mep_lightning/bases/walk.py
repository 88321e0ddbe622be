"""The walk through the U-Net: what no text has touched yet is computed once and shared by all members.

Everything before the first cross-attention (the first convolution, the resnets ahead of it, the first transformer's own
self-attention) sees latents and timestep alone. Members that differ only in their text share it; after the fork each
member has its own rows. The result is exact. SDXL's pooled text enters with the timestep: its members share nothing.
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from mep_lightning.bases.conditioning import Conditioning


class _Fork:
    """Rows that are shared until `now()` and one set a member from then on."""

    def __init__(self, members: int, x: Tensor, temb: Tensor):
        self.members, self.x, self.temb = members, x, temb
        self.skips = [x]

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self.members, *(1,) * (tensor.dim() - 1))

    def now(self) -> None:
        """Give each member its own rows of everything that later layers read."""
        self.temb, self.skips = self.rows(self.temb), [self.rows(s) for s in self.skips]


def predict_noise(
    unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, conditioning: Conditioning | Tensor
) -> Tensor:
    """What the U-Net predicts for V members over the same latents and timesteps.

    Args:
        unet: of a Stable Diffusion base.
        latents: [B, C, H, W], shared by the members.
        timestep: [B].
        conditioning: V * B prompts, member-major; a tensor [V * B, T, D] where embeddings are all there is.

    Returns:
        [V * B, C, H, W], member-major.
    """
    told = conditioning if isinstance(conditioning, Conditioning) else Conditioning(conditioning)
    embeds = told.embeds
    members = embeds.shape[0] // latents.shape[0]
    if members == 1 or told.pooled is not None or not _forkable(unet):
        rows = latents.repeat(members, 1, 1, 1)
        return unet(rows, timestep.repeat(members), embeds, added_cond_kwargs=told.added(rows)).sample

    temb = unet.time_embedding(unet.time_proj(timestep).to(latents.dtype))
    walk = _Fork(members, unet.conv_in(latents), temb)
    forked = False
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            walk.x = resnet(walk.x, walk.temb)
            if attention is not None:
                walk.x = attention(walk.x, embeds).sample if forked else _forking_transformer(attention, walk, embeds)
                forked = True
            walk.skips.append(walk.x)
        for downsample in block.downsamplers or []:
            walk.x = downsample(walk.x)
            walk.skips.append(walk.x)
    return _second_half(unet, walk, embeds)


def _forkable(unet: UNet2DConditionModel) -> bool:
    """Whether text enters only through cross-attention, the first of it in a plain transformer of a down block."""
    config = unet.config
    through_time = (config.addition_embed_type, config.class_embed_type, config.time_embedding_act_fn)
    plain = not any((*through_time, config.center_input_sample, config.encoder_hid_dim_type, unet.training))
    transformers = [a for block in unet.down_blocks for a in getattr(block, "attentions", [])]
    if not plain or unet.mid_block is None or not transformers or not isinstance(transformers[0], Transformer2DModel):
        return False
    first = transformers[0].transformer_blocks[0]
    return first.norm_type == "layer_norm" and not first.only_cross_attention and first.attn2 is not None


def _forking_transformer(transformer: Transformer2DModel, walk: _Fork, embeds: Tensor) -> Tensor:
    """The first transformer: shared up to its first cross-attention, one row a member from there."""
    x = walk.x
    _batch, _, height, width = x.shape
    first, *rest = transformer.transformer_blocks
    hidden, inner = transformer._operate_on_continuous_inputs(x)  # [B, HW, C]
    hidden = hidden + first.attn1(first.norm1(hidden))
    walk.now()
    hidden, x = walk.rows(hidden), walk.rows(x)
    hidden = _after_self_attention(first, hidden, embeds)
    for block in rest:
        hidden = block(hidden, encoder_hidden_states=embeds)
    return transformer._get_output_for_continuous_inputs(
        hidden_states=hidden, residual=x, batch_size=len(x), height=height, width=width, inner_dim=inner
    )


def _after_self_attention(block: BasicTransformerBlock, hidden: Tensor, embeds: Tensor) -> Tensor:
    hidden = hidden + block.attn2(block.norm2(hidden), encoder_hidden_states=embeds)
    return hidden + block.ff(block.norm3(hidden))


def _second_half(unet: UNet2DConditionModel, walk: _Fork, embeds: Tensor) -> Tensor:
    """Middle and up path; by now every member has its own rows."""
    x, temb, skips = walk.x, walk.temb, walk.skips
    x = unet.mid_block(x, temb, encoder_hidden_states=embeds)
    for block in unet.up_blocks:
        taken, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
        size = skips[-1].shape[2:] if skips else None
        if getattr(block, "has_cross_attention", False):
            x = block(
                hidden_states=x,
                res_hidden_states_tuple=taken,
                temb=temb,
                encoder_hidden_states=embeds,
                upsample_size=size,
            )
        else:
            x = block(hidden_states=x, res_hidden_states_tuple=taken, temb=temb, upsample_size=size)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)) if unet.conv_norm_out else x)
