"""What `auto` becomes: complete for every method and base, the papers' numbers where they give some."""

import itertools
from typing import ClassVar

import pytest

from mep_lightning import defaults
from mep_lightning.bases.load import PRECISIONS
from mep_lightning.errors import UserError
from mep_lightning.timesteps import PartialUniformTimesteps

EVERYWHERE = list(itertools.product(defaults.METHODS, defaults.FAMILIES, PRECISIONS))


OF_ITS_OWN = {
    "zoodip": {"n", "mu", "tau", "nu", "standardize"},
    "zoodip_fast": {"n", "mu", "standardize"},
    "lora": {"rank"},
    "lora_r1": {"rank"},
    "qlora": {"rank"},
    "gf_ti": {"population", "dims", "sigma"},
    "hollowed_net": {"rank", "fraction", "samples"},
    "selective": {"rank", "n", "mu", "standardize", "low_resolution"},
}


@pytest.mark.parametrize(("method", "family", "precision"), EVERYWHERE)
def test_a_method_has_all_that_it_needs_on_every_base(method, family, precision):
    values = defaults.lookup(method, family, precision)
    needed = {"lr", "lr_scheduler", "eps", "max_steps", "puts_low", "puts_high"}
    needed |= {"guidance", "sampling_steps", "sampling_batch"}
    assert needed | OF_ITS_OWN.get(method, set()) == set(values)
    assert all(value > 0 for key, value in values.items() if key not in ("puts_low", "lr_scheduler", "standardize"))
    assert isinstance(values["max_steps"], int) and isinstance(values["sampling_steps"], int)
    PartialUniformTimesteps(values["puts_low"], values["puts_high"])
    assert values["puts_high"] <= 1000


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (
            ("zoodip", "sd1", "fp32"),
            {"lr": 5e-3, "mu": 1e-3, "eps": 1e-3, "max_steps": 30_000, "puts_low": 500, "puts_high": 900},
        ),
        (("zoodip", "sd1", "int8"), {"n": 2, "tau": 128, "nu": 1e-3}),
        (("zoodip", "sd2", "int8"), {"lr": 1e-2, "mu": 1e-2, "max_steps": 30_000}),
        (("zoodip", "sdxl", "int8"), {"lr": 5e-3, "mu": 1e-2, "max_steps": 20_000, "puts_low": 700, "puts_high": 900}),
        (("zoodip", "sd1", "int4"), {"lr": 5e-3, "mu": 1e-2}),
        (("zoodip_fast", "sd1", "int8"), {"n": 4, "mu": 1e-2, "max_steps": 30_000 * 3 // 4 // 5}),
        (("zoodip_fast", "sdxl", "int8"), {"n": 4, "max_steps": 20_000 * 3 // 4 // 5, "puts_low": 700}),
        (("zoodip_fast", "tiny", "int8"), {"n": 8, "mu": 1e-3, "max_steps": 6_000 // 4}),
        (("textual_inversion", "sd1", "fp32"), {"lr": 5e-3, "max_steps": 5_000}),
        (("dreambooth", "sd1", "fp32"), {"lr": 5e-6, "max_steps": 400}),
        (("lora", "sd2", "fp32"), {"rank": 128}),
        (("lora_r1", "tiny", "fp32"), {"rank": 1}),
        (("hollowed_net", "sd2", "fp32"), {"rank": 128, "fraction": 0.39}),
        (("qlora", "sd1", "int4"), {"rank": 2, "lr": 1e-4, "max_steps": 500}),
        (("peqa", "sd1", "int8"), {"lr": 3e-6, "max_steps": 400}),
        (("tuneqdm", "sd1", "int8"), {"lr": 3e-6, "max_steps": 400}),
        (("gf_ti", "sd1", "int8"), {"dims": 256, "sigma": 1.0, "max_steps": 13_000}),
        (("selective", "sd1", "int8"), {"low_resolution": 256, "mu": 1e-2}),
    ],
)
def test_the_papers_numbers(where, expected):
    assert expected.items() <= defaults.lookup(*where).items()


@pytest.mark.parametrize(
    ("family", "precision", "mu"),
    [
        ("sd1", "int8", 1e-2),
        ("sd1", "fp16", 1e-2),
        ("sd1", "bf16", 3e-2),
        ("tiny", "int8", 1e-3),
        ("tiny", "int4", 1e-3),
    ],
)
def test_mu_is_what_the_activations_do_not_drown(family, precision, mu):
    assert defaults.lookup("zoodip", family, precision)["mu"] == mu


def test_a_later_row_wins_and_a_star_matches_everything(monkeypatch):
    rows = [("*", "*", "*", {"a": 1, "b": 1}), ("zoodip", "*", "int8", {"a": 2}), ("zoodip", "tiny", "*", {"a": 3})]
    monkeypatch.setattr(defaults, "_TABLE", rows)
    assert defaults.lookup("zoodip", "tiny", "int8") == {"a": 3, "b": 1}
    assert defaults.lookup("zoodip", "sd1", "int8") == {"a": 2, "b": 1}
    assert defaults.lookup("textual_inversion", "tiny", "int8") == {"a": 1, "b": 1}


def test_what_is_looked_up_may_be_changed_without_changing_the_table():
    defaults.lookup("zoodip", "tiny", "int8")["lr"] = 7
    assert defaults.lookup("zoodip", "tiny", "int8")["lr"] != 7


@pytest.mark.parametrize(
    ("where", "sentence", "known"),
    [
        (("zoodyp", "tiny", "int8"), "method 'zoodyp' is unknown", defaults.METHODS),
        (("zoodip", "sd9", "int8"), "base family 'sd9' is unknown", defaults.FAMILIES),
    ],
)
def test_unknown_names_are_answered_with_those_that_are_known(where, sentence, known):
    with pytest.raises(UserError, match=f"^{sentence}: choose one of {', '.join(known)}$"):
        defaults.lookup(*where)


class Part:
    AUTO: ClassVar = {"speed": "lr", "size": "n"}

    def __init__(self, speed, size):
        self.speed, self.size = speed, size


def test_auto_settings_are_filled_in_and_others_left():
    part = Part("auto", 3)
    defaults.fill_in(part, {"lr": 7, "n": 1}, "zoodip")
    assert (part.speed, part.size) == (7, 3)
    defaults.fill_in(object(), {}, "zoodip")  # a part without such settings


def test_an_auto_setting_without_a_default_is_named():
    with pytest.raises(UserError, match="^Part.size is auto, and zoodip has no default for it: give it a value.$"):
        defaults.fill_in(Part(1, "auto"), {"lr": 7}, "zoodip")
