"""The shared prefix: the same result as one full forward a member, for fewer FLOPs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch.utils.flop_counter import FlopCounterMode

from mep_lightning.bases.walk import predict_noise

LAYOUTS = {
    "tiny": dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2),
    "sd1": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
    ),
    "sd2": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
    ),
    "late": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
    ),
}


def unet(**layout):
    torch.manual_seed(0)
    layout = {"layers_per_block": 1} | layout
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
        **layout,
    )
    return model.eval().double()


def inputs(members, batch, side=8):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, side, side, generator=g, dtype=torch.float64)
    embeds = torch.randn(members * batch, 7, 24, generator=g, dtype=torch.float64)
    return latents, torch.arange(batch) * 311 + 5, embeds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("members", "batch", "side"), [(1, 1, 8), (3, 1, 8), (2, 3, 8), (3, 2, 12), (3, 1, 7)])
def test_equals_a_full_forward_a_member(layout, members, batch, side):
    model = unet(**LAYOUTS[layout])
    latents, t, embeds = inputs(members, batch, side)
    with torch.no_grad():
        walked = predict_noise(model, latents, t, embeds)
        each = torch.cat([model(latents, t, rows).sample for rows in embeds.chunk(members)])
    torch.testing.assert_close(walked, each, rtol=1e-11, atol=1e-12)


def shared_share(model, latents, t, embeds):
    """The share of one member's FLOPs that all members share."""

    def flops(members):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            predict_noise(model, latents, t, embeds.repeat(members, 1, 1))
        return counter.get_total_flops()

    return 1 - (flops(3) - flops(2)) / flops(1)


def test_members_share_what_no_text_has_touched():
    latents, t, embeds = inputs(1, 1)
    assert 0.02 < shared_share(unet(**LAYOUTS["sd1"]), latents, t, embeds) < 0.5
    assert shared_share(unet(**LAYOUTS["late"]), latents, t, embeds) > shared_share(
        unet(**LAYOUTS["sd1"]), latents, t, embeds
    )


def test_gradients_flow_to_every_members_text():
    model = unet(**LAYOUTS["sd1"])
    latents, t, embeds = inputs(3, 2)
    embeds.requires_grad_()
    (walked,) = torch.autograd.grad(predict_noise(model, latents, t, embeds).square().sum(), embeds)
    each = model(latents.repeat(3, 1, 1, 1), t.repeat(3), embeds).sample
    (full,) = torch.autograd.grad(each.square().sum(), embeds)
    torch.testing.assert_close(walked, full, rtol=1e-9, atol=1e-10)


def test_members_part_earlier_where_text_enters_earlier():
    model = unet(**LAYOUTS["sd1"], only_cross_attention=True)
    latents, t, embeds = inputs(3, 1)
    with torch.no_grad():
        each = torch.cat([model(latents, t, rows).sample for rows in embeds.chunk(3)])
        torch.testing.assert_close(predict_noise(model, latents, t, embeds), each, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_changes_memory_and_no_gradient(layout):
    model = unet(**LAYOUTS[layout])
    latents, t, embeds = inputs(1, 2)
    embeds.requires_grad_()
    found, kept = [], []
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            out = predict_noise(model, latents, t, embeds, checkpointing=checkpointing).square().sum()
        found.append(torch.autograd.grad(out, embeds)[0])
        kept.append(sum(sizes))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("differ", ["texts", "layers"])
def test_checkpointing_changes_no_gradient_of_members_that_part_on_the_way(layout, differ):
    model = unet(**LAYOUTS[layout])
    latents, t, embeds = inputs(3 if differ == "texts" else 1, 1)
    embeds.requires_grad_()
    late = [part for part in model.up_blocks.modules() if isinstance(part, BasicTransformerBlock)][-1]
    apart = [] if differ == "texts" else [late.attn1.to_q]
    found = []
    for checkpointing in (False, True):
        out = predict_noise(model, latents, t, embeds, members=3, apart=apart, checkpointing=checkpointing)
        assert len(out) == 3
        found.append(torch.autograd.grad(out.square().sum(), embeds)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_members_of_different_layers_part_at_the_first_of_them():
    model = unet(**LAYOUTS["sd1"])
    latents, t, embeds = inputs(1, 1)
    late = model.up_blocks[-1].attentions[-1].transformer_blocks[0].attn1.to_q
    seen = {}
    for layer in (model.conv_in, model.mid_block.resnets[0], late):
        layer.register_forward_hook(lambda part, x, _: seen.update({part: len(x[0])}))
    with torch.no_grad():
        walked = predict_noise(model, latents, t, embeds, members=3, apart=[late])
        torch.testing.assert_close(walked, model(latents, t, embeds).sample.repeat(3, 1, 1, 1))
    predict_noise(model, latents, t, embeds, members=3, apart=[late])
    assert list(seen.values()) == [1, 1, 3]
    predict_noise(model, latents, t, embeds, members=3, apart=[late, model.time_embedding.linear_1])
    assert list(seen.values()) == [3, 3, 3]
