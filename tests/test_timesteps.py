"""Samplers draw what they say, and follow a base's schedule unless they have their own."""

import pytest
import torch

from mep_lightning import PersonalizationModule
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.timesteps import SNRTimesteps, UniformTimesteps


def test_snr_timesteps_follow_the_min_snr_weight(tiny_base):
    alphas = tiny_base.scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    drawn = SNRTimesteps(alphas).sample(50_000, torch.Generator().manual_seed(0))
    weight = snr.clamp_max(5) / snr
    expected = (weight[:500].sum() / weight.sum()).item()
    assert abs((drawn < 500).float().mean().item() - expected) < 0.01


def test_a_schedule_may_end_in_pure_noise():
    assert SNRTimesteps(torch.tensor([0.99, 0.5, 0.0])).probability.tolist() == pytest.approx([5 / 99, 1, 1])


@pytest.mark.parametrize("sampler", [SNRTimesteps, UniformTimesteps])
def test_a_sampler_follows_the_base_unless_it_was_given_a_schedule(sampler):
    base, own = torch.linspace(0.9, 0.1, 70), torch.linspace(0.9, 0.1, 20)
    given = sampler(own if sampler is SNRTimesteps else len(own))
    for timesteps, total in ((sampler(), 70), (given, 20)):
        timesteps.follow(base)
        drawn = timesteps.sample(5_000, torch.Generator().manual_seed(0))
        assert drawn.max() == total - 1


def test_where_v_is_predicted_the_weight_is_that_of_its_error():
    alphas = torch.tensor([0.99, 0.9, 0.5, 0.1, 0.0])
    snr = alphas / (1 - alphas)
    expected = (snr.clamp_max(5) / (snr + 1)).tolist()
    followed = SNRTimesteps()
    followed.follow(alphas, "v_prediction")
    for sampler in (followed, SNRTimesteps(alphas, prediction="v_prediction")):
        assert sampler.probability.tolist() == pytest.approx(expected)
    given = SNRTimesteps(alphas)
    given.follow(alphas, "v_prediction")
    assert given.probability.tolist() == pytest.approx([5 / 99, 5 / 9, 1, 1, 1])


def test_a_sampler_given_to_two_modules_follows_each_ones_base(tiny_base):
    given = SNRTimesteps()
    module = PersonalizationModule(adapter=TokenEmbedding(init="ball"), timesteps=given)
    module.take(tiny_base)
    assert given.probability is None and len(module.timesteps.probability) == len(tiny_base.scheduler.alphas_cumprod)
