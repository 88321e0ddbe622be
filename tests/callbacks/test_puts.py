"""PUTS changes which timesteps any module draws."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mep_lightning import defaults
from mep_lightning.callbacks import PUTS
from mep_lightning.errors import UserError
from mep_lightning.timesteps import PartialUniformTimesteps, SNRTimesteps, UniformTimesteps


def drawn(module) -> torch.Tensor:
    return module.timesteps.sample(4000, torch.Generator().manual_seed(0))


def with_base(module, steps=1000, method="zoodip", family="sd1", precision="int8"):
    schedule = SimpleNamespace(alphas_cumprod=torch.linspace(1, 0, steps))
    module.base = SimpleNamespace(scheduler=schedule, family=family, precision=precision)
    module.method = method
    return module


def test_every_timestep_from_low_to_below_high_is_drawn_and_no_other(module, data, trainer_of):
    module.timesteps = None
    trainer_of(PUTS(10, 20), max_steps=1).fit(module, data)
    assert set(drawn(module).tolist()) == set(range(10, 20))


@pytest.mark.parametrize(("low", "high"), [("auto", "auto"), (7, "auto"), ("auto", 999)])
def test_auto_is_what_the_defaults_say_for_method_and_base(module, data, trainer_of, low, high):
    module.timesteps = None
    callback = PUTS(low, high)
    trainer_of(callback, max_steps=1).fit(with_base(module), data)
    values = defaults.lookup("zoodip", "sd1", "int8")
    assert callback.low == (values["puts_low"] if low == "auto" else low)
    assert callback.high == (values["puts_high"] if high == "auto" else high)
    assert drawn(module).min() >= callback.low
    assert drawn(module).max() < callback.high


def test_a_module_without_timesteps_is_refused_with_the_mend(module, data, trainer_of):
    with pytest.raises(UserError, match="Noisy has no such attribute: set one in __init__ or leave PUTS out"):
        trainer_of(PUTS(1, 2)).fit(module, data)


def test_auto_needs_a_module_that_has_defaults(module, data, trainer_of):
    module.timesteps = None
    with pytest.raises(UserError, match="PUTS.low is auto, and Noisy has no default for it: give it a value"):
        trainer_of(PUTS()).fit(module, data)


@pytest.mark.parametrize(
    "sampler", [SNRTimesteps(torch.linspace(0.9, 0.1, 10)), PartialUniformTimesteps(0, 100)], ids=lambda one: type(one)
)
def test_two_samplers_contradict_each_other(sampler, module, data, trainer_of):
    module.timesteps = sampler
    name = type(sampler).__name__
    with pytest.raises(UserError, match=f"PUTS and the module's {name} both say which timesteps are drawn"):
        trainer_of(PUTS(500, 900)).fit(module, data)
    assert module.timesteps is sampler


def test_all_timesteps_and_those_of_an_earlier_fit_give_way(module, data, trainer_of):
    module.timesteps = UniformTimesteps()
    callback = PUTS(10, 20)
    for one, bounds in ((callback, (10, 20)), (callback, (10, 20)), (PUTS(30, 40), (30, 40))):
        trainer_of(one, max_steps=1).fit(module, data)
        assert set(drawn(module).tolist()) == set(range(*bounds))


def test_an_earlier_fit_is_no_leave_to_override_what_another_module_asks_for(module, data, trainer_of):
    module.timesteps = UniformTimesteps()
    callback = PUTS(10, 20)
    trainer_of(callback, max_steps=1).fit(module, data)
    other = type(module)()
    other.timesteps = PartialUniformTimesteps(10, 20)
    with pytest.raises(UserError, match="leave one of them out"):
        trainer_of(callback, max_steps=1).fit(other, data)


def test_bounds_above_the_schedule_are_refused(module, data, trainer_of):
    module.timesteps = None
    with pytest.raises(UserError, match="high is 101, but the base has 100 timesteps"):
        trainer_of(PUTS(1, 101)).fit(with_base(module, steps=100), data)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(5, 5, "not below high"), (9, 3, "not below high"), (-1, 3, "low is -1")]
)
def test_bounds_that_hold_nothing_are_refused_at_once(low, high, words):
    with pytest.raises(UserError, match=words):
        PUTS(low, high)


def test_auto_is_asked_anew_in_every_fit(module, data, trainer_of):
    callback, found = PUTS(), []
    for family in ("sdxl", "sd1"):
        module.timesteps = None
        trainer_of(callback, max_steps=1).fit(with_base(module, family=family), data)
        found.append((callback.low, callback.high))
    assert found == [(700, 900), (500, 900)]
