"""A U-Net's transformers as ours compute them: the same predictions, less in memory, the same module names."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from mep_lightning.bases import transformer
from mep_lightning.bases.transformer import BlockwiseFeedForward, compute_frugally_


@pytest.fixture
def unets(tiny_base):
    """diffusers' own and ours, over the same weights."""
    ours = copy.deepcopy(tiny_base.unet)
    theirs = copy.deepcopy(ours)
    theirs.set_attn_processor(AttnProcessor2_0())
    for part in theirs.modules():
        if isinstance(part, BlockwiseFeedForward):
            part.__class__ = BlockwiseFeedForward.__mro__[1]
    return theirs, ours


def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 32, 128, generator=generator)
    return latents, torch.tensor([10, 500, 900]), embeds


@pytest.mark.parametrize("hidden", [1, 10_000, 2**30], ids=["a row at a time", "some rows", "whole"])
def test_predictions_stay(unets, monkeypatch, hidden):
    monkeypatch.setattr(transformer, "HIDDEN", hidden)
    with torch.no_grad():
        expected, found = (unet(*inputs()).sample for unet in unets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_stay(unets, monkeypatch):
    monkeypatch.setattr(transformer, "HIDDEN", 1)
    gradients = []
    for unet in unets:
        latents, timestep, embeds = inputs()
        embeds.requires_grad_()
        gradients.append(torch.autograd.grad(unet(latents, timestep, embeds).sample.pow(2).sum(), embeds)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_a_feed_forward_layer_never_has_its_hidden_layer_whole(unets, monkeypatch):
    layer = next(part for part in unets[1].modules() if isinstance(part, BlockwiseFeedForward))
    seen = []
    layer.net[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    monkeypatch.setattr(transformer, "HIDDEN", 5 * layer.net[-1].in_features)
    x = torch.randn(2, 9, layer.net[-1].out_features)
    with torch.no_grad():
        layer(x)
    assert max(seen) == transformer.HIDDEN and sum(seen) == 18 * layer.net[-1].in_features


def test_modules_and_their_names_stay(unets):
    names = [[name for name, _ in unet.named_modules()] for unet in unets]
    assert names[0] == names[1]
    compute_frugally_(unets[0])
    assert sum(isinstance(part, BlockwiseFeedForward) for part in unets[0].modules()) > 0
