"""A zeroth-order step as it is commonly written: what ours is measured against.

Members one after the other, each with its own text encoding and whole forward pass; quantised weights dequantised
before every product; the photo encoded in every step; noise from a generator, PyTorch's Adam, no graph; diffusers'
U-Net as it comes.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from mep_lightning.bases import Base, Conditioning
from mep_lightning.bases.bands import BANDED
from mep_lightning.bases.frugal import REPLACED
from mep_lightning.bases.tokens import token_ids
from mep_lightning.quantization import Int8Conv2d, Int8Linear


class DequantizingLinear(nn.Module):
    """Int8 weights, made floating point whole before each product."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
        return F.linear(x, weight, self.bias)


class DequantizingConv2d(nn.Module):
    """As `DequantizingLinear`."""

    def __init__(self, layer: Int8Conv2d) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def as_it_comes_(module: nn.Module) -> None:
    """Take our ways of computing out of a U-Net or an autoencoder, channels last among them."""
    if isinstance(module, UNet2DConditionModel):
        module.set_attn_processor(AttnProcessor2_0())
    plain = {ours: theirs for theirs, ours in (REPLACED | BANDED).items()}
    for part in module.modules():
        part.__class__ = plain.get(type(part), type(part))
    for tensor in (*module.parameters(), *module.buffers()):  # int8 weights are buffers
        tensor.data = tensor.data.contiguous()


def plainly_dequantizing_(module: nn.Module) -> None:
    """Put the plain layers in the place of ours, over the same weights."""
    for name, child in list(module.named_children()):
        if isinstance(child, Int8Linear):
            setattr(module, name, DequantizingLinear(child))
        elif isinstance(child, Int8Conv2d):
            setattr(module, name, DequantizingConv2d(child))
        else:
            plainly_dequantizing_(child)


class OrdinaryStep:
    """One-sided random gradient estimation of a token, in place in the embedding tables.

    Args:
        base: loaded, with its autoencoder; taken over.
        photo: [1, 3, H, W] in [-1, 1].
        n: directions.
        mu: the finite step.
        compiled: whether U-Net and text encoders go through `torch.compile`.
    """

    def __init__(self, base: Base, photo: Tensor, n: int = 2, mu: float = 1e-3, compiled: bool = False) -> None:
        assert base.vae is not None
        self.base, self.photo, self.n, self.mu = base, photo, n, mu
        as_it_comes_(base.unet)
        as_it_comes_(base.vae)
        base.vae.disable_tiling()
        for part in (base.unet, *base.text_encoders):
            plainly_dequantizing_(part)
        compile_ = torch.compile if compiled else (lambda part: part)
        self.unet, self.text_encoders = compile_(base.unet), [compile_(encoder) for encoder in base.text_encoders]
        self.tables: list[Tensor] = [encoder.get_input_embeddings().weight for encoder in base.text_encoders]  # type: ignore[operator]
        self.ids = [token_ids(tokenizer, ["a photo of a ball"]).to(base.device) for tokenizer in base.tokenizers]
        self.row = int(self.ids[0][0, 5])  # the noun stands in for the new token
        self.token = nn.Parameter(torch.cat([table[self.row].detach().float() for table in self.tables]))
        self.optimizer = torch.optim.Adam([self.token], lr=5e-3, eps=1e-3)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Take a step; the members' losses [n + 1]."""
        base, vae = self.base, self.base.vae
        assert vae is not None
        latents = (vae.encode(self.photo).latent_dist.sample() * base.scaling_factor).to(base.dtype)
        noise, timestep = torch.randn_like(latents), torch.randint(500, 900, (1,), device=latents.device)
        noisy = base.scheduler.add_noise(latents, noise, timestep)
        directions = [torch.randn_like(self.token) for _ in range(self.n)]
        losses = []
        for move in (torch.zeros_like(self.token), *directions):
            told = self._told(self.token + self.mu * move)
            predicted = self.unet(noisy, timestep, told.embeds, added_cond_kwargs=told.added(noisy)).sample
            losses.append((predicted.float() - noise.float()).pow(2).mean())
        slopes = [(loss - losses[0]) / self.mu for loss in losses[1:]]
        self.token.grad = sum(
            (slope * move for slope, move in zip(slopes, directions, strict=True)), torch.zeros_like(self.token)
        ) / len(directions)
        self.optimizer.step()
        return torch.stack(losses)

    def _told(self, token: Tensor) -> Conditioning:
        """The prompt with a member's token in its place."""
        for table, values in zip(self.tables, token.split(self.base.text_widths), strict=True):
            table[self.row] = values.to(table.dtype)
        if len(self.text_encoders) == 1:
            return Conditioning(self.text_encoders[0](self.ids[0]).last_hidden_state)
        answers = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.text_encoders, self.ids, strict=True)
        ]
        embeds = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
        return Conditioning(embeds, answers[-1].text_embeds, self.base.vae_factor)
