"""Finite differences are taken in whole fp32 products, whatever a GPU's convolutions take otherwise."""

import copy

import pytest
import torch

from mep_lightning.bases import load_base, predict_noise
from mep_lightning.estimators import ForwardGradientEstimator, RandomGradientEstimator
from mep_lightning.kernels.tf32 import whole_products

SWITCHES = (torch.backends.cudnn, torch.backends.cuda.matmul)


@pytest.fixture
def tf32():
    """Both are on, as a user may have them."""
    before = [switch.allow_tf32 for switch in SWITCHES]
    for switch in SWITCHES:
        switch.allow_tf32 = True
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


def test_switches_are_put_back(tf32):
    with whole_products():
        assert not any(switch.allow_tf32 for switch in SWITCHES)
        with whole_products():
            pass
        assert not any(switch.allow_tf32 for switch in SWITCHES)
    assert all(switch.allow_tf32 for switch in SWITCHES)


def test_differences_are_taken_in_whole_products_and_tangents_need_not_be(tf32):
    seen = []

    def loss_fn(values):
        seen.append([switch.allow_tf32 for switch in SWITCHES])
        return (values * values).flatten(1).sum(1)

    RandomGradientEstimator(n=1).estimate(loss_fn, torch.ones(3))
    ForwardGradientEstimator(n=1).estimate(loss_fn, torch.ones(3))
    assert seen == [[False, False], [True, True]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_step_is_not_drowned_on_a_gpu():
    base = load_base("tiny", device="cuda", vae=False)
    wide = copy.deepcopy(base.unet).double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator).cuda()
    embeds, moves = (torch.randn(1, 77, 128, generator=generator) for _ in range(2))
    t, mu = torch.tensor([400], device="cuda"), 1e-3

    def slope(unet, dtype):
        members = torch.cat([embeds, embeds + mu * moves]).to("cuda", dtype)
        with torch.no_grad(), whole_products():
            losses = predict_noise(unet, latents.to(dtype), t, members, members=2).double().square().flatten(1).mean(1)
        return (losses[1] - losses[0]) / mu

    torch.testing.assert_close(slope(base.unet, torch.float32), slope(wide, torch.float64), rtol=0.1, atol=1e-4)
