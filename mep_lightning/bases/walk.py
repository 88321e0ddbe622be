"""The walk through the U-Net: members share what does not tell them apart yet, and a hollow is stepped over.

Members that differ in their text alone part at the first cross-attention: the first convolution, the resnets ahead of
it and the first transformer's self-attention see latents and timestep only, and are computed once. Members that differ
in their layers part at the first of those. The result is exact. SDXL's pooled text enters with the timestep: there
members of different texts share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mep_lightning.bases.conditioning import Conditioning
from mep_lightning.bases.units import Cut, Unit, is_line, line


def predict_noise(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning | Tensor,
    *,
    members: int | None = None,
    apart: Iterable[nn.Module] = (),
    checkpointing: bool = False,
    cut: Cut | None = None,
    activation: Tensor | None = None,
) -> Tensor:
    """What the U-Net predicts for V members over the same latents and timesteps.

    Args:
        unet: of a Stable Diffusion base.
        latents: [B, C, H, W], shared by the members.
        timestep: [B].
        conditioning: V * B prompts, member-major, or B that all members share; a tensor [V * B, T, D] where embeddings
            are all there is.
        members: V; as many as there are prompts for by default.
        apart: the layers that members differ in.
        checkpointing: keep each unit's input alone for a backward pass, and compute the rest again there; members of
            different texts then part ahead of the first transformer.
        cut: what to leave out.
        activation: [B, C', H', W'], what the cut would have answered (`activation_at`).

    Returns:
        [V * B, C, H, W], member-major.
    """
    told = _told(conditioning)
    if not is_line(unet):
        return _all_apart(unet, latents, timestep, told, members or len(told.embeds) // len(latents))
    units = line(unet)
    fork = _first(units, set(apart))
    walk = _Walk(unet, latents, timestep, told, members, checkpointing, apart=fork == 0)
    for index, unit in enumerate(units):
        if cut is not None and cut.start <= index < cut.stop:
            continue
        if cut is not None and index == cut.stop:
            assert activation is not None
            walk.part()
            walk.x = walk.rows(activation.to(walk.x.dtype))
        if index == fork:
            walk.part()
        walk.take(unit)
    return walk.leave()


def _told(conditioning: Conditioning | Tensor) -> Conditioning:
    return conditioning if isinstance(conditioning, Conditioning) else Conditioning(conditioning)


def _all_apart(
    unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, told: Conditioning, members: int
) -> Tensor:
    rows = torch.cat([latents] * members)
    told = told.repeat(len(rows) // len(told.embeds))
    return unet(rows, timestep.repeat(members), told.embeds, added_cond_kwargs=told.added(rows)).sample


def activation_at(
    unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, conditioning: Conditioning | Tensor, cut: Cut
) -> Tensor:
    """What a cut of the U-Net answers, [B, C', H', W']: Hollowed Net's first path. Arguments as for `predict_noise`."""
    walk = _Walk(unet, latents, timestep, _told(conditioning), None, checkpointing=False)
    for unit in line(unet)[: cut.stop]:
        walk.take(unit)
    return walk.x


def _first(units: list[Unit], layers: set[nn.Module]) -> int | None:
    """The first unit that holds one of the layers; the first of all where one is outside the line."""
    if not layers:
        return None
    inside = [{part for part in unit.module.modules() if part in layers} for unit in units]
    return next((index for index, found in enumerate(inside) if found), 0) if set().union(*inside) == layers else 0


class _Walk:
    """Where a walk is: x, what will be joined to it, and what it is told; shared rows until members part.

    Attributes:
        members: V.
        x: [B or V * B, C, H, W].
        temb: the timestep's embedding, as many rows.
        skips: the outputs that were left behind.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timestep: Tensor,
        told: Conditioning,
        members: int | None,
        checkpointing: bool,
        apart: bool = False,
    ) -> None:
        self.unet, self.embeds = unet, told.embeds
        self.members = members or len(told.embeds) // len(latents)
        self.parted = self.members == 1
        self.texts_differ = len(told.embeds) > len(latents)
        self.checkpointing = checkpointing and torch.is_grad_enabled()
        self.x, self.skips = latents, []  # type: tuple[Tensor, list[Tensor]]
        self.temb = unet.time_proj(timestep).to(latents.dtype)
        if apart:
            self.part()
        self.temb = unet.time_embedding(self.temb)
        if told.pooled is not None:
            if self.texts_differ:
                self.part()
            elif self.parted:  # `part` gave the timestep's embedding a row for every member
                told = told.repeat(self.members)
            added = unet.get_aug_embed(self.temb, told.embeds, told.added(self.x))
            self.temb = self.temb + added
        if unet.time_embed_act is not None:
            self.temb = unet.time_embed_act(self.temb)

    def rows(self, tensor: Tensor) -> Tensor:
        """A set of rows for every member, in the memory format that these have."""
        return torch.cat([tensor] * self.members)

    def part(self) -> None:
        """Give each member its own rows of everything that later units read."""
        if not self.parted:
            self.parted = True
            self.x, self.temb, self.skips = self.rows(self.x), self.rows(self.temb), [self.rows(s) for s in self.skips]
            self.embeds = self.embeds if self.texts_differ else self.rows(self.embeds)

    def take(self, unit: Unit) -> None:
        """Go through a unit."""
        layer = unit.module
        if isinstance(layer, ResnetBlock2D):
            skip = [self.skips.pop()] if unit.takes else []
            self.x = self._run(lambda x, temb, *skip: layer(torch.cat([x, *skip], 1) if skip else x, temb), skip)
        elif isinstance(layer, Transformer2DModel):
            self.x = self._through(layer)
        elif isinstance(layer, Upsample2D):
            self.x = layer(self.x, self.skips[-1].shape[2:] if self.skips else None)
        else:
            self.x = layer(self.x)
        if unit.leaves:
            self.skips.append(self.x)

    def leave(self) -> Tensor:
        """Through what comes after the last unit."""
        norm, activation = self.unet.conv_norm_out, self.unet.conv_act
        predicted = self.unet.conv_out(self.x if norm is None else activation(norm(self.x)))
        return predicted if self.parted else self.rows(predicted)

    def _run(self, function: Callable[..., Tensor], extra: list[Tensor]) -> Tensor:
        arguments = (self.x, self.temb, *extra)
        return checkpoint(function, *arguments, use_reentrant=False) if self.checkpointing else function(*arguments)

    def _through(self, transformer: Transformer2DModel) -> Tensor:
        """A transformer's blocks, the first of them shared up to its cross-attention where members have not parted."""
        first, *rest = transformer.transformer_blocks
        if self.texts_differ and (self.checkpointing or not _can_part_inside(first)):
            self.part()  # not within what a checkpoint computes again: by then members have parted
        if self.checkpointing and not rest:
            return checkpoint(self._all_through, transformer, self.x, self.embeds, use_reentrant=False)
        return self._all_through(transformer, self.x, self.embeds)

    def _all_through(self, transformer: Transformer2DModel, x: Tensor, embeds: Tensor) -> Tensor:
        blocks = list(transformer.transformer_blocks)
        height, width = x.shape[2:]
        hidden, inner = transformer._operate_on_continuous_inputs(x)  # [B, HW, C]
        if self.texts_differ and not self.parted:
            first = blocks.pop(0)
            hidden = hidden + first.attn1(first.norm1(hidden))
            self.part()
            hidden, x = self.rows(hidden), self.x
            hidden = hidden + first.attn2(first.norm2(hidden), encoder_hidden_states=embeds)
            hidden = hidden + first.ff(first.norm3(hidden))
        for block in blocks:
            hidden = self._block(block, hidden, embeds, len(transformer.transformer_blocks) > 1)
        return transformer._get_output_for_continuous_inputs(
            hidden_states=hidden, residual=x, batch_size=len(x), height=height, width=width, inner_dim=inner
        )

    def _block(self, block: BasicTransformerBlock, hidden: Tensor, embeds: Tensor, one_of_many: bool) -> Tensor:
        told: dict[str, Any] = {"encoder_hidden_states": embeds}
        if self.checkpointing and one_of_many:
            return checkpoint(block, hidden, use_reentrant=False, **told)
        return block(hidden, **told)


def _can_part_inside(block: BasicTransformerBlock) -> bool:
    return block.norm_type == "layer_norm" and not block.only_cross_attention and block.attn2 is not None
