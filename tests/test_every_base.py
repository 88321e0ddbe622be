"""Every method on every family of bases, at a small size: a step of each of its branches, and a picture's."""

import numpy as np
import pytest
import torch

from benchmarks.performance import made_up
from mep_lightning.bases import load_base
from mep_lightning.commands.budget import available_precisions, recipe
from mep_lightning.commands.recipes import find_recipe, read_recipe
from mep_lightning.defaults import METHODS
from mep_lightning.estimation import give_gradient
from mep_lightning.evaluation import generate
from mep_lightning.hollow import cuts
from mep_lightning.plan.rehearsal import branches, draw_of
from tests.single_file import KINDS


@pytest.fixture(scope="module")
def small_bases(made_single_files):
    """Bases by kind and precision, loaded once."""
    loaded = {}

    def base(kind, precision):
        if (kind, precision) not in loaded:
            loaded[kind, precision] = load_base(made_single_files / kind, precision)
        return loaded[kind, precision]

    return base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_steps_and_draws(small_bases, kind, method):
    precision = read_recipe(find_recipe(method))["model"]["precision"]
    if precision not in available_precisions():
        pytest.skip(f"{precision} is not available here")
    torch.manual_seed(0)
    module, base = recipe(method)(precision, None), small_bases(kind, precision)
    module.class_word = "ball"
    for part in module.adapter.parts:
        if hasattr(part, "init"):
            part.init = "ball"
    if module.selector is not None:
        module.low_resolution = base.resolution // 2  # auto is what fits the real size
    if module.hollow is not None:
        module.hollow.fraction = cuts(base.unet)[0].fraction
    try:
        module.take(base)
        before = {name: theta.detach().clone() for name, theta in module.adapter.named_parameters()}
        optimizer = module.configure_optimizers()
        for _, estimator, resolution in branches(module, base.resolution):
            draw = draw_of(module, estimator, made_up.batch(base, resolution))
            optimizer.zero_grad()
            losses = give_gradient(module, estimator, draw, optimizer)
            assert losses.isfinite().all() and (losses > 0).all()
            optimizer.step()
        assert any(not torch.equal(theta, before[name]) for name, theta in module.adapter.named_parameters())
        (image,) = generate(module, ["a photo of a <sks> ball"], [0], steps=1)
        assert len(np.unique(np.asarray(image))) > 8  # a picture that is not finite is grey
    finally:
        module.adapter.detach()


@pytest.mark.slow
def test_sd15_steps_at_its_real_size():
    """859 million made-up weights in int8, two directions at 256 px: losses tell the directions apart.

    Made-up weights are small, and little of a prompt comes through: the directions are long.
    """
    module = recipe("zoodip")("int8", None)
    module.estimator.mu = 10.0
    base = made_up.load(made_up.found("sd15", "int8", "cpu"), module)
    assert sum(value.numel() for value in base.unet.state_dict().values()) > 859e6
    module.take(base)
    draw = draw_of(module, module.estimator, made_up.batch(base, 256))
    optimizer = module.configure_optimizers()
    before = module.adapter.theta.detach().clone()
    losses = give_gradient(module, module.estimator, draw, optimizer)
    optimizer.step()
    assert losses.shape == (3,) and losses.isfinite().all() and losses.std() > 0
    assert module.adapter.theta.shape[-1] == 768 and not torch.equal(module.adapter.theta, before)
