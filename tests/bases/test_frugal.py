"""A U-Net as ours computes: the same predictions, less in memory, the same module names."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from mep_lightning.bases import frugal
from mep_lightning.bases.frugal import BlockwiseFeedForward, compute_frugally_


@pytest.fixture
def unets(tiny_base):
    """diffusers' own and ours, over the same weights."""
    ours = copy.deepcopy(tiny_base.unet)
    theirs = copy.deepcopy(ours)
    theirs.set_attn_processor(AttnProcessor2_0())
    for part in theirs.modules():
        part.__class__ = {mine: plain for plain, mine in frugal.REPLACED.items()}.get(type(part), type(part))
    return theirs, ours


def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 32, 128, generator=generator)
    return latents, torch.tensor([10, 500, 900]), embeds


@pytest.mark.parametrize("hidden", [1, 10_000, 2**30], ids=["a row at a time", "some rows", "whole"])
def test_predictions_stay(unets, monkeypatch, hidden):
    monkeypatch.setattr(frugal, "HIDDEN", hidden)
    with torch.no_grad():
        expected, found = (unet(*inputs()).sample for unet in unets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_stay(unets, monkeypatch):
    monkeypatch.setattr(frugal, "HIDDEN", 1)
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
    monkeypatch.setattr(frugal, "HIDDEN", 5 * layer.net[-1].in_features)
    x = torch.randn(2, 9, layer.net[-1].out_features)
    with torch.no_grad():
        layer(x)
    assert max(seen) == frugal.HIDDEN and sum(seen) == 18 * layer.net[-1].in_features


def test_modules_and_their_names_stay(unets):
    names = [[name for name, _ in unet.named_modules()] for unet in unets]
    assert names[0] == names[1]
    compute_frugally_(unets[0])
    assert sum(isinstance(part, BlockwiseFeedForward) for part in unets[0].modules()) > 0


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_a_transformer_leaves_an_image_in_its_memory_format(unets, last):
    layout = torch.channels_last if last else torch.contiguous_format
    embeds = torch.randn(2, 32, 128)
    theirs, ours = (next(p for p in unet.modules() if isinstance(p, frugal.Transformer2DModel)) for unet in unets)
    x = torch.randn(2, ours.in_channels, 8, 8).to(memory_format=layout)
    with torch.no_grad():
        answer = ours.to(memory_format=layout)(x, encoder_hidden_states=embeds).sample
        torch.testing.assert_close(answer, theirs(x, encoder_hidden_states=embeds).sample)
    assert answer.is_contiguous(memory_format=layout)


def test_what_computes_as_ours_does_is_exchanged_and_nothing_else(unets):
    theirs, ours = ({type(part) for part in unet.modules()} for unet in unets)
    assert theirs.isdisjoint(frugal.REPLACED.values()) and ours.isdisjoint(frugal.REPLACED)
    assert ours - set(frugal.REPLACED.values()) == theirs - set(frugal.REPLACED)
