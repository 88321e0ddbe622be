"""A U-Net as a line of units, each run after the one before, and the ranges of it that may be left out.

In the down path units leave their outputs behind as skips, and in the up path resnets take the last one left. So the
first half of the line mirrors the second: a range around the middle is legal to leave out where no skip made inside it
is taken outside, which is what Hollowed Net (arXiv 2411.01179) does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from mep_lightning.quantization import QuantizedWeight

BLOCKS = (DownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D, CrossAttnUpBlock2D)
LAYERS = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)


@dataclass(frozen=True, eq=False)
class Unit:
    """One module of the line.

    Attributes:
        name: where it is in the U-Net, such as `down_blocks.1.resnets.0`.
        module: a convolution, resnet, transformer, down- or upsampler.
        takes: whether the last skip is joined to its input.
        leaves: whether its output is left behind as a skip.
    """

    name: str
    module: nn.Module
    takes: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Cut:
    """A legal range `units[start:stop]` to leave out; what comes after it needs one tensor, its output.

    Attributes:
        start, stop: indices into the line.
        fraction: of the U-Net's parameters.
        first, last: names of its first and last unit.
    """

    start: int
    stop: int
    fraction: float
    first: str
    last: str


def is_line(unet: UNet2DConditionModel) -> bool:
    """Whether a U-Net is of the blocks that the line knows, as those of SD1, SD2, SDXL and tiny are."""
    config, blocks = unet.config, (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    is_told_more = config.class_embed_type or config.encoder_hid_dim_type or config.num_class_embeds
    is_other = is_told_more or config.center_input_sample or config.addition_embed_type not in (None, "text_time")
    if is_other or not all(type(block) in BLOCKS for block in blocks):
        return False
    layers = [layer for block in blocks for _, layer in _parts(block)]
    is_plain = all(isinstance(layer, LAYERS) for layer in layers)
    return is_plain and all(one.is_input_continuous for one in layers if isinstance(one, Transformer2DModel))


def line(unet: UNet2DConditionModel) -> list[Unit]:
    """The units from `conv_in` to the last resnet or transformer; `conv_out` and its norm come after all of them."""
    units = [Unit("conv_in", unet.conv_in, leaves=True)]
    for index, block in enumerate(unet.down_blocks):
        parts = list(_parts(block))
        for here, (name, layer) in enumerate(parts):
            following = parts[here + 1][1] if here + 1 < len(parts) else None
            leaves = not (isinstance(layer, ResnetBlock2D) and isinstance(following, Transformer2DModel))
            units.append(Unit(f"down_blocks.{index}.{name}", layer, leaves=leaves))
    units += [Unit(f"mid_block.{name}", layer) for name, layer in _parts(unet.mid_block)]
    for index, block in enumerate(unet.up_blocks):
        for name, layer in _parts(block):
            units.append(Unit(f"up_blocks.{index}.{name}", layer, takes=isinstance(layer, ResnetBlock2D)))
    return units


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block's layers in the order of their calls, with their names there."""
    own: Any = block
    resnets, attentions = list(own.resnets), list(getattr(block, "attentions", []))
    if isinstance(block, UNetMidBlock2DCrossAttn):
        yield "resnets.0", resnets.pop(0)
        order = (("attentions", attentions, 0), ("resnets", resnets, 1))
    else:
        order = (("resnets", resnets, 0), ("attentions", attentions, 0))
    for index in range(len(resnets)):
        for name, layers, offset in order:
            if index < len(layers):
                yield f"{name}.{index + offset}", layers[index]
    for name in ("downsamplers", "upsamplers"):
        for index, layer in enumerate(getattr(block, name, None) or []):
            yield f"{name}.{index}", layer


def cuts(unet: UNet2DConditionModel) -> list[Cut]:
    """Every legal range around the middle, the smallest first; each begins behind the last skip made outside it."""
    units = line(unet)
    leaving = [index for index, unit in enumerate(units) if unit.leaves]
    taking = [index for index, unit in enumerate(units) if unit.takes]
    weights = [_weights([unit.module]) for unit in units]
    total = _weights([unet])
    found = []
    for inside in range(len(leaving)):  # skips that are made and taken inside
        start = leaving[len(leaving) - 1 - inside] + 1
        first_stop = taking[inside - 1] + 1 if inside else taking[0]
        for stop in range(first_stop, taking[inside] + 1):
            share = sum(weights[start:stop]) / total
            found.append(Cut(start, stop, share, units[start].name, units[stop - 1].name))
    return sorted(found, key=lambda cut: cut.fraction)


def _weights(modules: Sequence[nn.Module]) -> int:
    """Weights as they are before packing; those of adapters do not count."""
    count = 0
    for module in modules:
        for name, part in module.named_modules():
            if "lora_" in name:
                continue
            count += sum(value.numel() for value in part.parameters(recurse=False))
            if isinstance(part, QuantizedWeight):
                count += part.weight_shape.numel()
    return count
