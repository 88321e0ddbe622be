"""Which branch a step takes: a function of (seed, step) and its timesteps alone, as probable as is asked for."""

import pytest
import torch

from mep_lightning.errors import UserError
from mep_lightning.selection import ConstantSelector, StepwiseSelector, TimestepAwareSelector


@pytest.mark.parametrize(
    ("t", "step", "expected"),
    [(500, 99, 0.0), (500, 100, 0.5 * 0.1), (1000, 1000, 1.0), (0, 500, 0.0), (250, 800, 0.25 * 0.8)],
)
def test_rises_with_timestep_and_progress_after_a_warm_up(t, step, expected):
    assert TimestepAwareSelector(alpha=1.0, beta=1.0, warmup=0.1).probability(t, step, 1000) == pytest.approx(expected)


def test_exponents_shape_it_and_0_leaves_out():
    assert TimestepAwareSelector(alpha=0.5, beta=0.0, warmup=0.0).probability(250, 0, 1000) == pytest.approx(0.5)
    assert TimestepAwareSelector(alpha=0.0, beta=2.0, warmup=0.0).probability(1, 500, 1000) == pytest.approx(0.25)


def test_may_fall_with_the_timestep_instead():
    falling = TimestepAwareSelector(alpha=2.0, beta=1.0, warmup=0.0, falling=True)
    assert falling.probability(250, 800, 1000) == pytest.approx(0.75**2 * 0.8)
    assert falling.probability(1000, 800, 1000) == 0


def test_the_ablations_selectors():
    assert ConstantSelector(0.3).probability(999, 0, 10) == 0.3
    assert [StepwiseSelector(0.5).probability(0, step, 10) for step in (0, 4, 5, 9)] == [0, 0, 1, 1]


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_branches_come_as_often_as_they_are_probable(chance):
    selector = ConstantSelector(chance)
    high = [selector.takes_high(torch.tensor([5]), 0, step, 4000) for step in range(4000)]
    assert sum(high) / 4000 == pytest.approx(chance, abs=0.025)


def test_the_same_seed_and_step_take_the_same_branch_whatever_was_drawn_before():
    selector = TimestepAwareSelector(warmup=0.0, beta=0.0)
    steps = range(200)
    taken = [selector.takes_high(torch.tensor([600]), 1, step, 200) for step in steps]
    torch.manual_seed(99)
    assert [selector.takes_high(torch.tensor([600]), 1, step, 200) for step in reversed(steps)] == taken[::-1]
    assert [selector.takes_high(torch.tensor([600]), 2, step, 200) for step in steps] != taken


def test_a_batch_takes_one_branch_by_the_mean_of_its_timesteps():
    selector = TimestepAwareSelector(warmup=0.0, beta=0.0)
    high = [selector.takes_high(torch.tensor([0, 1000]), 0, step, 4000) for step in range(4000)]
    assert sum(high) / 4000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimestepAwareSelector(alpha=-1), "TimestepAwareSelector.alpha is -1; use 0 or more"),
        (lambda: TimestepAwareSelector(beta=-1), "TimestepAwareSelector.beta is -1; use 0 or more"),
        (lambda: TimestepAwareSelector(warmup=2), "TimestepAwareSelector.warmup is 2; use a share from 0 to 1"),
        (lambda: ConstantSelector(1.5), "ConstantSelector.chance is 1.5; use a share from 0 to 1"),
        (lambda: StepwiseSelector(-0.1), "StepwiseSelector.switch is -0.1; use a share from 0 to 1"),
    ],
)
def test_what_is_no_probability_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
