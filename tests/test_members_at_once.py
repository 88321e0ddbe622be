"""A step's members in portions: the same losses, in less memory."""

import pytest
import torch

from mep_lightning import PersonalizationModule
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.bases import load_base, open_base
from mep_lightning.commands.budget import recipe
from mep_lightning.errors import UserError
from mep_lightning.estimators import CMAES, ForwardGradientEstimator, RandomGradientEstimator
from mep_lightning.estimators.perturbation import Members
from mep_lightning.plan import rehearse
from tests.personalizing import fitted


def module_on(base, at_once, adapter=None, **settings):
    adapter = TokenEmbedding(init="ball") if adapter is None else adapter
    module = PersonalizationModule(adapter=adapter, members_at_once=at_once, lr=1e-2, eps=1e-8, **settings)
    module.class_word = "ball"
    module.take(base)
    return module


def five_members(module):
    """Of a population, or as an estimator asks for them."""
    if isinstance(module.estimator, CMAES):
        generator = torch.Generator().manual_seed(0)
        return module.adapter.theta.detach() + torch.randn(5, 1, 128, generator=generator) / 10
    return module.estimator.asked(0).drawn_for(module.adapter.numbered())


def losses_of(module, base, members):
    """Losses and the sizes of the batches that went through the half of the U-Net in which members differ."""
    generator, sizes = torch.Generator().manual_seed(1), []
    mean = torch.randn(1, 4, 16, 16, generator=generator)
    draw = module.draw({"mean": mean, "std": torch.ones_like(mean), "prompts": ["a {}"]})
    hook = base.unet.conv_out.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        losses = module.losses(members, draw)
    hook.remove()
    module.adapter.detach()
    return losses, sizes


MAKERS = {
    "RGE": lambda: {"estimator": RandomGradientEstimator(n=4, mu=1e-3)},
    "CMA-ES": lambda: {"estimator": CMAES(population=5, dims=16, sigma=0.5)},
    "RGE of a LoRA": lambda: {"estimator": RandomGradientEstimator(n=4, mu=1e-3), "adapter": LoRA(rank=2)},
}


@pytest.mark.parametrize("way", MAKERS)
@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 5), (2, [2, 2, 2]), (4, [3, 3]), (9, [5])])
def test_losses_are_those_of_all_at_once(tiny_base, way, at_once, sizes):
    (together, whole), (apart, counted) = (
        losses_of(module, tiny_base, five_members(module))
        for module in (module_on(tiny_base, asked, **MAKERS[way]()) for asked in (None, at_once))
    )
    assert (whole, counted) == ([5], sizes)
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=0)
    assert len(set(together.tolist())) == 5


def test_a_run_learns_what_it_does_with_all_at_once(tmp_path):
    def learned(at_once):
        module = PersonalizationModule(
            precision="int8",
            adapter=TokenEmbedding(init="ball"),
            estimator=RandomGradientEstimator(n=5, mu=1e-3, standardize=True),
            lr=1e-2,
            eps=1e-8,
            members_at_once=at_once,
        )
        fitted(6, tmp_path, module)
        return module.adapter.theta.detach()

    start = module_started()
    together, apart = learned(None), learned(2)
    assert (apart - together).norm() <= 0.02 * (together - start).norm()


def module_started():
    module = PersonalizationModule(adapter=TokenEmbedding(init="ball"))
    module.load()
    return module.adapter.theta.detach()


@pytest.mark.parametrize("method", ["RGE", "CMA-ES"])
def test_its_plan_takes_less(method):
    found = open_base("tiny", "int8")
    whole, one = (
        rehearse([PersonalizationModule(precision="int8", members_at_once=at_once, **MAKERS[method]())], found, 64)[0]
        for at_once in (None, 1)
    )
    assert one["step"].activations < 0.6 * whole["step"].activations
    assert {name: peak for name, peak in one.items() if name != "step"} == {
        name: peak for name, peak in whole.items() if name != "step"
    }


def test_on_tiny_a_zeroth_order_run_takes_less_than_40_percent_of_textual_inversions():
    """With members three and pictures two at a time; what docs/reproduction.md says."""

    def peak(name, precision, at_once=None, pictures=4):
        module = recipe(name)(precision, None)
        module.members_at_once = at_once
        (phases,) = rehearse([module], open_base("tiny", precision), 64, pictures=pictures)
        return max(phase.total for phase in phases.values())

    backprop = peak("textual_inversion", "fp32", pictures=2)
    assert 0.35 < peak("zoodip", "int8", 3, 2) / backprop < 0.37
    assert 0.35 < peak("zoodip_fast", "int8", 3, 2) / backprop < 0.37


@pytest.mark.parametrize("wrong", [0, -2, 1.5, True])
def test_less_than_one_is_refused(wrong):
    with pytest.raises(UserError, match=f"model.members_at_once is {wrong}"):
        PersonalizationModule(members_at_once=wrong)


def test_where_there_are_no_members_it_is_said(monkeypatch, tmp_path):
    noted = []
    monkeypatch.setattr("mep_lightning.advice.rank_zero_warn", noted.append)
    fitted(1, tmp_path, module_one_at_a_time(ForwardGradientEstimator(n=2)))
    assert noted[-1] == "model.members_at_once does nothing here: a step has one member; leave it null"
    fitted(1, tmp_path, module_one_at_a_time(RandomGradientEstimator(n=2, mu=1e-3), at_once=3))
    assert noted[-1] == "model.members_at_once does nothing here: a step has 3 members; leave it null"
    noted.clear()
    fitted(1, tmp_path, module_one_at_a_time(RandomGradientEstimator(n=2, mu=1e-3)))
    assert not noted


def module_one_at_a_time(estimator, at_once=1):
    return PersonalizationModule(
        adapter=TokenEmbedding(init="ball"), estimator=estimator, members_at_once=at_once, lr=1e-2, eps=1e-8
    )


def test_the_first_member_alone_is_computed_as_beside_others():
    """In half precision another way to the same term would be a slope of its own once it is divided by mu."""
    base = load_base("tiny", "bf16", vae=False)
    settings = {"estimator": RandomGradientEstimator(n=2, mu=3e-2), "adapter": LoRA(rank=4), "precision": "bf16"}
    found = []
    for at_once in (None, 1):
        module = module_on(base, at_once, **{**settings, "adapter": LoRA(rank=4)})
        with torch.no_grad():
            for index, up in enumerate(module.adapter.up.values()):
                up.copy_(0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(index)))
        found.append(losses_of(module, base, module.estimator.asked(0).drawn_for(module.adapter.numbered()))[0])
    together, apart = found
    slopes = (together[1:] - together[0]) / 3e-2
    assert abs(apart[0] - together[0]) / 3e-2 < 0.02 * slopes.abs().min()


@pytest.mark.parametrize(("count", "world"), [(3, 2), (9, 2), (9, 4), (2, 3), (4, 4)])
def test_ranks_shares_are_of_one_size(count, world):
    """In batches of another size kernels round otherwise."""
    members = Members([(0, 0.0), *((i, 1.0) for i in range(count - 1))], mu=1e-3)
    shares = [members.part(rank, world) for rank in range(world)]
    assert {len(mine) for mine, _ in shares} == {-(-count // world)}
    assert sorted(place for _, places in shares for place in places) == list(range(count))
    for mine, places in shares:
        own = mine.probes[len(mine) - len(places) :]
        assert own == [members.probes[place] for place in places] and not mine.is_alone
    assert Members().is_alone and members.chosen([0]).is_here
