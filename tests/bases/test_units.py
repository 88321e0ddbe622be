"""The U-Net as a line of units, and what of it may be left out."""

import pytest
import torch

from mep_lightning import defaults
from mep_lightning.bases import open_base
from mep_lightning.bases.load import build_unet
from mep_lightning.bases.skeleton import architecture
from mep_lightning.bases.units import cuts, is_line, line
from mep_lightning.bases.walk import activation_at, predict_noise
from mep_lightning.hollow import nearest_cut
from tests.bases.test_walk import LAYOUTS, inputs, unet


def real(name):
    return build_unet(open_base("tiny").folder if name == "tiny" else architecture(name))


@pytest.mark.parametrize("name", ["tiny", "sd15", "sd21", "sdxl"])
def test_the_line_holds_every_layer_once_and_its_skips_are_all_taken(name):
    model = real(name)
    units = line(model)
    assert is_line(model)
    assert sum(unit.leaves for unit in units) == sum(unit.takes for unit in units)
    inside = [part for unit in units for part in unit.module.modules() if part._parameters]
    outside = [
        model.time_embedding,
        model.conv_norm_out,
        model.conv_out,
        *filter(None, [getattr(model, "add_embedding", None)]),
    ]
    rest = [part for owner in outside for part in owner.modules() if part._parameters]
    assert {*inside, *rest} == {part for part in model.modules() if part._parameters}
    assert len(inside) == len(set(inside))
    for unit in units:
        assert model.get_submodule(unit.name) is unit.module


def test_the_papers_cut_is_among_those_of_sd21():
    found = {(cut.first, cut.last): cut for cut in cuts(real("sd21"))}
    cut = found["down_blocks.2.downsamplers.0", "up_blocks.0.upsamplers.0"]
    assert cut.fraction == pytest.approx(0.389, abs=5e-4)  # Hollowed Net, arXiv 2411.01179


@pytest.mark.parametrize("name", ["tiny", "sd15", "sd21", "sdxl"])
def test_cuts_hold_the_middle_and_leave_both_ends(name):
    model = real(name)
    units, found = line(model), cuts(model)
    assert len({(cut.start, cut.stop) for cut in found}) == len(found)
    for cut in found:
        names = [unit.name for unit in units[cut.start : cut.stop]]
        assert (names[0], names[-1]) == (cut.first, cut.last)
        assert any(each.startswith("mid_block") for each in names) and "conv_in" not in names
        inside = units[cut.start : cut.stop]
        assert sum(unit.leaves for unit in inside) == sum(unit.takes for unit in inside)
        assert units[cut.start - 1].leaves  # no unit ahead of it is run for nothing
    fractions = [cut.fraction for cut in found]
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] < 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("members", "shared"), [(1, True), (3, False), (3, True)])
def test_a_walk_around_a_hollow_equals_the_whole_one(layout, members, shared):
    """Every layer that has to do with skips is at its place: with the true activation nothing changes."""
    model = unet(**LAYOUTS[layout])
    latents, t, embeds = inputs(1, 2)
    told = embeds if shared else embeds.repeat(members, 1, 1)
    with torch.no_grad():
        whole = predict_noise(model, latents, t, told, members=members)
        for cut in cuts(model):
            activation = activation_at(model, latents, t, embeds, cut)
            around = predict_noise(model, latents, t, told, members=members, cut=cut, activation=activation)
            torch.testing.assert_close(around, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["tiny", "sd15", "sd21", "sdxl"])
def test_the_default_fraction_has_a_cut_near(name):
    family = {"tiny": "tiny", "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[name]
    fraction = defaults.lookup("hollowed_net", family, "fp32")["fraction"]
    assert abs(nearest_cut(cuts(real(name)), fraction).fraction - fraction) < 0.05
