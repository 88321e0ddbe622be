"""Large pictures through an autoencoder in bands of rows, so that no layer's picture is in memory beside a copy of it.

diffusers' decoder holds nearly four times its largest layer's input: the block's, the layer's, the norm of that, and
what the activation makes of it. Here a convolution normalises and activates its own input a band at a time, writes over
what nobody reads again, and a block lets go of what the one before it made. The numbers are those of the layers as they
are, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from mep_lightning.kernels.stacks import is_channels_last

BAND = 2**21
"""Values of a layer at a time; smaller pictures go through whole. Fewer save more memory and take more launches."""

Before = Callable[[Tensor], Tensor]
"""What is done to rows of a convolution's input first; it answers as many rows."""


class BandedConv2d(nn.Conv2d):
    """A convolution that may take its input in bands, and prepare each of them first.

    Padded with zeros, neither dilated nor in groups, as all of an autoencoder's are.
    """

    def forward(
        self,
        input: Tensor,
        before: Before | None = None,
        *,
        onto: Tensor | None = None,
        adds: bool = False,
        grows: int = 1,
        below: int = 0,
    ) -> Tensor:
        """input [B, C, H, W] -> [B, D, H', W']; all at once where nothing else is asked for.

        Args:
            input: the picture.
            before: of its rows.
            onto: where the answer goes, of its shape; may be `input`. By default somewhere new.
            adds: whether the answer is added to what is there.
            grows: how many times as high and wide the input becomes first, each pixel repeated.
            below: rows and columns of zeros after the last, beside the convolution's own padding.
        """
        if before is None and onto is None and grows == 1 and not below:
            return super().forward(input)
        height, width = (grows * size + below for size in input.shape[2:])
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        rows = (height + 2 * padding - kernel) // stride + 1
        columns = (width + 2 * padding - kernel) // stride + 1
        if onto is None:
            layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
            shape = (len(input), self.out_channels, rows, columns)
            onto = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
        at_once = _rows_at_once(len(input) * max(self.out_channels * columns, self.in_channels * stride * width))
        overwritten: Tensor | None = None  # of `input`, the last rows before the present band
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            first, last = start * stride - padding, (stop - 1) * stride - padding + kernel  # of what is convolved
            begin, end = max(first, 0), min(last, height - below)
            band = input[:, :, begin // grows : -(-end // grows)]
            if onto is input:
                following = input[:, :, stop - padding : stop].clone()
                if overwritten is not None:
                    band = torch.cat([overwritten, input[:, :, start : -(-end // grows)]], 2)
                overwritten = following
            if before is not None:
                band = before(band)
            if grows > 1:
                band = F.interpolate(band, scale_factor=float(grows), mode="nearest")
                skipped = begin - begin // grows * grows
                band = band[:, :, skipped : skipped + end - begin]
            if begin > first or last > end or below:
                band = F.pad(band, (0, below, begin - first, last - end))
            made = F.conv2d(band, self.weight, self.bias, stride, (0, padding))
            target = onto[:, :, start:stop]
            target.add_(made) if adds else target.copy_(made)
        return onto


class BandedResnet(ResnetBlock2D):
    """diffusers' residual block; of a large picture it holds the input and what it answers."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor [B, C, H, W] -> [B, D, H, W]."""
        largest = input_tensor.numel() // self.in_channels * max(self.in_channels, self.out_channels)
        if temb is not None or largest <= BAND or torch.is_grad_enabled() or not self._is_plain:
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = self.conv1(input_tensor, activated(self.norm1, self.nonlinearity, input_tensor))
        hidden = self.conv2(hidden, activated(self.norm2, self.nonlinearity, hidden), onto=hidden)
        if self.conv_shortcut is None:
            return hidden.add_(input_tensor)
        summed: Tensor = self.conv_shortcut(input_tensor, onto=hidden, adds=True)
        return summed

    @property
    def _is_plain(self) -> bool:
        """Whether it is as autoencoders have it: no time, no other size, no scale."""
        resized = self.upsample is not None or self.downsample is not None
        widened = self.conv2.out_channels != self.conv1.out_channels
        return self.time_emb_proj is None and self.output_scale_factor == 1 and not resized and not widened


class BandedUpsample(Upsample2D):
    """diffusers' upsampling and convolution, without the upsampled picture in between."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, C, H, W] -> [B, D, 2 H, 2 W]."""
        is_plain = self.name == "conv" and self.norm is None and self.use_conv and output_size is None
        if 4 * hidden_states.numel() <= BAND or torch.is_grad_enabled() or not is_plain:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        grown: Tensor = self.conv(hidden_states, grows=2)
        return grown


class BandedDownsample(Downsample2D):
    """diffusers' padding and convolution, without the padded picture in between."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, C, H, W] -> [B, D, H / 2, W / 2]."""
        is_plain = self.norm is None and self.use_conv and self.padding == 0
        if hidden_states.numel() <= BAND or torch.is_grad_enabled() or not is_plain:
            return super().forward(hidden_states, *args, **kwargs)
        shrunk: Tensor = self.conv(hidden_states, below=1)
        return shrunk


class BandedEncoder(Encoder):
    """diffusers' encoder; no block's input outlives the block's first layer."""

    def forward(self, sample: Tensor) -> Tensor:
        """sample [B, 3, H, W] -> [B, 2 C, h, w]."""
        if torch.is_grad_enabled():
            return super().forward(sample)
        sample = self.conv_in(sample)
        for layer in _layers(self.down_blocks):
            sample = layer(sample)
        sample = self.mid_block(sample)
        return _last(self, sample)


class BandedDecoder(Decoder):
    """As `BandedEncoder`."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """sample [B, C, h, w] -> [B, 3, H, W]."""
        if latent_embeds is not None or torch.is_grad_enabled():
            return super().forward(sample, latent_embeds)
        sample = self.mid_block(self.conv_in(sample))
        for layer in _layers(self.up_blocks):
            sample = layer(sample)
        return _last(self, sample)


def _layers(blocks: nn.ModuleList) -> Iterator[Callable[[Tensor], Tensor]]:
    """The blocks' layers one by one, where a block is nothing but them in a row."""
    for block in blocks:
        if isinstance(block, DownEncoderBlock2D | UpDecoderBlock2D):
            resized = block.downsamplers if isinstance(block, DownEncoderBlock2D) else block.upsamplers
            yield from (_without_time(resnet) for resnet in block.resnets)
            yield from resized or ()
        else:
            yield block


def _without_time(resnet: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda sample: resnet(sample, None)


def _last(part: Any, sample: Tensor) -> Tensor:
    """The norm, activation and convolution that end an encoder or a decoder."""
    if sample.numel() <= BAND:
        whole: Tensor = part.conv_out(part.conv_act(part.conv_norm_out(sample)))
        return whole
    made: Tensor = part.conv_out(sample, activated(part.conv_norm_out, part.conv_act, sample))
    return made


def activated(norm: nn.GroupNorm, activation: nn.Module, picture: Tensor) -> Before:
    """Group norm and activation of any rows of a picture, by the statistics of all of it.

    Args:
        norm: the layer.
        activation: what follows it.
        picture: [B, C, H, W]; its statistics are taken now.
    """
    wide = torch.promote_types(picture.dtype, torch.float32)
    mean, variance = (
        value.repeat_interleave(norm.num_channels // norm.num_groups, 1) for value in moments(picture, norm.num_groups)
    )
    scale = norm.weight / (variance + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    scale, shift = (value.to(wide)[..., None, None] for value in (scale, shift))

    def apply(band: Tensor) -> Tensor:
        normed = torch.addcmul(shift, band.to(wide), scale)
        made = F.silu(normed, inplace=True) if isinstance(activation, nn.SiLU) else activation(normed)
        return made.to(band.dtype)

    return apply


def moments(picture: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group of channels, [B, groups], without a copy of the picture.

    Sums of squares are taken around each channel's mean in the first rows, so that a large mean drowns nothing.
    """
    batch, channels, height, width = picture.shape
    wide = torch.promote_types(picture.dtype, torch.float32)
    at_once = _rows_at_once(batch * channels * width)
    middle = picture[:, :, :at_once].to(wide).mean((2, 3), keepdim=True)
    exact = torch.float32 if picture.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    total, squares = (torch.zeros(batch, channels, dtype=exact, device=picture.device) for _ in range(2))
    for band in picture.split(at_once, 2):
        around = band.to(wide) - middle
        total += around.sum((2, 3))
        squares += around.square_().sum((2, 3))
    pixels = height * width
    offset = total / pixels
    means = (middle[..., 0, 0] + offset).unflatten(1, (groups, -1))
    variances = (squares / pixels - offset.square()).unflatten(1, (groups, -1))
    mean = means.mean(2)
    return mean, (variances + (means - mean[..., None]).square()).mean(2)


def _rows_at_once(values: int) -> int:
    """How many rows of so many values each are a band; an even number, which half as many make twice as high."""
    return max(BAND // values // 2 * 2, 2)


BANDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: BandedConv2d,
    ResnetBlock2D: BandedResnet,
    Upsample2D: BandedUpsample,
    Downsample2D: BandedDownsample,
    Encoder: BandedEncoder,
    Decoder: BandedDecoder,
}
"""What of an autoencoder computes in bands; a module's tensors and their names stay."""
