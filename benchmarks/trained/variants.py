"""What is trained in the suites of trained cells: variants, each a method's settings with something changed."""

from __future__ import annotations

from inspect import signature
from typing import Any

Settings = dict[str, Any]

BACKPROP: Settings = {
    "method": "textual_inversion",
    "estimator": "Backprop",
    "precision": "fp32",
    "sg": False,
    "puts": False,
}
ZOODIP: Settings = {
    "method": "zoodip",
    "estimator": "RandomGradientEstimator",
    "precision": "int8",
    "normalize": True,
    "sg": True,
    "puts": True,
}
FAST: Settings = ZOODIP | {"method": "zoodip_fast", "normalize": False, "sg": False, "conditioning": True}
LORA: Settings = BACKPROP | {"method": "lora", "adapter": "LoRA"}
SELECTIVE: Settings = LORA | {
    "method": "selective",
    "estimator": "SPSAEstimator",
    "precision": "int8",
    "normalize": True,
    "selector": ["TimestepAwareSelector", {"alpha": 1.0, "beta": 1.0, "warmup": 0.1}],
}
METHODS: dict[str, Settings] = {
    "untrained": BACKPROP | {"max_steps": 0},
    "textual_inversion": BACKPROP,
    "textual_inversion_lite": BACKPROP
    | {"method": "textual_inversion_lite", "precision": "int8", "checkpointing": True},
    "zoodip": ZOODIP,
    "zoodip_fast": FAST,
}
"""Every method with its own values and budget."""
QUALITY: dict[str, Settings] = METHODS | {"zoodip, 1,500 steps": ZOODIP | {"max_steps": 1_500}}
"""The methods, and what ZOODiP itself comes to in the forward passes of `zoodip_fast`."""
SCALES: Settings = BACKPROP | {"method": "peqa", "adapter": "QuantizationScales", "precision": "int8"}
DREAMBOOTH: Settings = BACKPROP | {"method": "dreambooth", "adapter": "FullUNet"}
BASELINES: dict[str, Settings] = {
    "dreambooth": DREAMBOOTH,
    "qlora": LORA | {"method": "qlora", "precision": "int4"},
    "peqa": SCALES,
    "tuneqdm": SCALES | {"method": "tuneqdm", "input_channels": True},
    "gf_ti": BACKPROP | {"method": "gf_ti", "estimator": "CMAES", "precision": "int8"},
}
"""Methods of ZOODiP's Table 1 whose values are searched here, and that `mep compare` compares."""
SHORT: Settings = ZOODIP | {"max_steps": 1_000, "puts": False}
PUTS: Settings = {"puts": True, "puts_low": 500, "puts_high": 900}
ABLATION: dict[str, Settings] = {
    "SG": SHORT,
    "no SG": SHORT | {"sg": False},
    "PUTS 500..900, no SG": SHORT | PUTS | {"sg": False},
    "SG, PUTS 500..900": SHORT | PUTS,
    "n=1": SHORT | {"n": 1},
    "n=2": SHORT | {"n": 2},
    "n=4": SHORT | {"n": 4},
    "SPSA": SHORT | {"estimator": "SPSAEstimator"},
    "one-point": SHORT | {"estimator": "OnePointEstimator", "standardize": False},
    "one-point, differences": SHORT | {"estimator": "NeighbouringPoints"},
    "SNR timesteps": SHORT | {"timesteps": "SNRTimesteps"},
    "μ 1e-4": SHORT | {"mu": 1e-4},
    "μ 1e-2": SHORT | {"mu": 1e-2},
}
"""ZOODiP with one part changed, in steps that suffice to tell them apart; the first is what the others vary.

On tiny it draws all timesteps, so PUTS has the paper's bounds for SD1.5 here.
"""
SUBSPACES: dict[str, Settings] = {
    f"τ {tau}, ν {nu:g}": SHORT | {"tau": tau, "nu": nu}
    for tau in (8, 16, 32, 64, 128)
    for nu in (1e-1, 1e-2, 1e-3, 1e-4)
}
"""The settings of Subspace Gradient (ZOODiP's Table 4), for a token of 128 dimensions instead of 768."""
RANGES: dict[str, Settings] = {
    f"{low}..{high}": BACKPROP | {"puts": True, "puts_low": low, "puts_high": high}
    for low in range(0, 1000, 250)
    for high in range(low + 250, 1001, 250)
}
TIMESTEPS: dict[str, Settings] = RANGES | {
    "dreambooth": DREAMBOOTH,
    "dreambooth, 500..1000": DREAMBOOTH | {"puts": True, "puts_low": 500, "puts_high": 1000},
    "zoodip_fast": FAST,
    "zoodip_fast, 500..900": FAST | PUTS,
}
"""Textual Inversion on part of the timesteps (ZOODiP's Figures 4 and 7), DreamBooth (its Table S7), and PUTS with
`zoodip_fast`, whose held-out loss levels off within its budget.
"""
PRECISIONS: dict[str, Settings] = {
    precision: SHORT | {"precision": precision} for precision in ("fp32", "bf16", "int8", "int4")
}
"""ZOODiP on the base in every precision, with the mu that each wants."""
CARRIED: Settings = SHORT | {"estimator": "ForwardGradientEstimator"}
FORWARD: dict[str, Settings] = {
    "fp32, finite difference": SHORT | {"precision": "fp32"},
    "fp32, tangents": CARRIED | {"precision": "fp32"},
    "bf16, finite difference, μ 1e-3": SHORT | {"precision": "bf16", "mu": 1e-3},
    "bf16, finite difference, its best μ": SHORT | {"precision": "bf16"},
    "bf16, tangents": CARRIED | {"precision": "bf16"},
    "int8, bf16 activations, tangents": CARRIED | {"activations": "bf16"},
    "int8, int8 activations, tangents": CARRIED | {"activations": "int8"},
}
"""What half precision does to a training by finite differences and by tangents; otherwise as `PRECISIONS`."""
PLAIN: Settings = SHORT | {
    "sg": False,
    "normalize": False,
    "standardize": True,
    "lr": 5e-3,
    "lr_scheduler": "constant",
    "eps": 1e-8,
}
NARROW: Settings = PLAIN | {"conditioning": True, "lr": 1e-2, "lr_scheduler": "linear", "standardize": False}
ESTIMATORS: dict[str, Settings] = {
    "RGE, n=8": PLAIN,
    "lr falling from 1e-2": PLAIN | {"lr": 1e-2, "lr_scheduler": "linear"},
    "n=2": PLAIN | {"n": 2, "max_steps": 3_000},
    "n=2, lr falling from 1e-2": PLAIN | {"n": 2, "max_steps": 3_000, "lr": 1e-2, "lr_scheduler": "linear"},
    "n=32, lr 1e-2": PLAIN | {"n": 32, "max_steps": 272, "lr": 1e-2},
    "n=32, lr falling from 4e-2": PLAIN | {"n": 32, "max_steps": 272, "lr": 4e-2, "lr_scheduler": "linear"},
    "losses as they are (no FZOO)": PLAIN | {"standardize": False},
    "SPSA": PLAIN | {"estimator": "SPSAEstimator", "max_steps": 562},
    "tangents": PLAIN | {"estimator": "ForwardGradientEstimator"},
    "no momentum": PLAIN | {"betas": (0.0, 0.999)},
    "momentum 0.98": PLAIN | {"betas": (0.98, 0.999)},
    "one second moment (MEAZO)": PLAIN | {"estimator": "ScalarMoment", "eps": 1e4, "lr": 1e-2 * 1e4},
    "guided search": PLAIN | {"guided": True},
    "prompt search first": PLAIN | {"searched": True, "max_steps": 800},
    "orthogonal directions": PLAIN | {"conditioning": True, "share": 1.0},
    "conditioning subspace": NARROW,
    "conditioning subspace, n=4": NARROW | {"n": 4, "max_steps": 1_800},
    "conditioning subspace, n=16": NARROW | {"n": 16, "max_steps": 529, "lr": 2e-2},
    "conditioning subspace, tangents": NARROW | {"estimator": "ForwardGradientEstimator"},
    "conditioning subspace, prompt search first": NARROW | {"searched": True, "max_steps": 800},
}
"""Ways to a token in 9,000 forward passes, the search's among them; the first is what the others vary."""
GF_TI = BASELINES["gf_ti"]
THIRD: Settings = GF_TI | {"dims": 43}
SEARCH: dict[str, Settings] = {
    "CMA-ES": GF_TI,
    "a third of the dimensions": THIRD,
    "a third, components of length 1": THIRD | {"estimator": "UnitComponents"},
    "a third, random directions": THIRD | {"estimator": "RandomDirections"},
    "noise of each member's own": GF_TI | {"own_noise": True},
    "to the best of the last population": GF_TI | {"estimator": "BestOfPopulation"},
    "a third of length 1, own noise, to the best": THIRD | {"estimator": "PublicCMAES", "own_noise": True},
}
"""GF-TI as it is shipped, and with what its public code does otherwise; a third of 128 as 256 are of 768."""
FRACTIONS = (0.202, 0.43, 0.502, 0.702, 0.901)
"""Cuts of tiny's U-Net (`bases.units.cuts`), as shares of its parameters."""
FALLING = {"selector": ["TimestepAwareSelector", {"alpha": 1.0, "beta": 1.0, "warmup": 0.1, "falling": True}]}
LORAS: dict[str, Settings] = {
    "untrained": LORA | {"max_steps": 0},
    "dreambooth": DREAMBOOTH,
    "lora": LORA,
    "lora_r1": LORA | {"method": "lora_r1"},
    **{f"hollowed {share:.0%}": LORA | {"method": "hollowed_net", "fraction": share} for share in FRACTIONS},
    "selective": SELECTIVE,
    "BP-low alone": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.0}]},
    "ZO-high alone": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 1.0}]},
    "constant probability": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.25}]},
    "step-wise switch": SELECTIVE | {"selector": ["StepwiseSelector", {"switch": 0.75}]},
    "selective, falling with t": SELECTIVE | FALLING,
    "selective, low at 32 px": SELECTIVE | {"low_resolution": 32},
    "BP-low alone, at 32 px": SELECTIVE | {"selector": ["ConstantSelector", {"chance": 0.0}], "low_resolution": 32},
    "selective, falling with t, low at 32 px": SELECTIVE | FALLING | {"low_resolution": 32},
}
"""LoRA whole, hollowed, and selectively optimised; the selectors take ZO-high about as often as one another.

Half the side, as the paper has it, leaves 2 x 2 latents in the middle of tiny's U-Net; its default is three quarters.
"""
SUITES = {
    "quality": QUALITY,
    "ablation": ABLATION,
    "subspace": SUBSPACES,
    "timesteps": TIMESTEPS,
    "precision": PRECISIONS,
    "forward": FORWARD,
    "estimators": ESTIMATORS,
    "search": SEARCH,
    "loras": LORAS,
}
SWITCHES = {"sg": ("tau", "nu"), "conditioning": ("share", "every"), "puts": ("puts_low", "puts_high")}
"""Parts that a variant may lack, and the settings that are theirs."""
PROJECTIONS = {"sg": "SubspaceGradient", "conditioning": "ConditioningSubspace", "guided": "GuidedSearch"}


def resolve(settings: Settings) -> Settings:
    """Everything that a variant's figures depend on: its settings, and the defaults where it has none."""
    from mep_lightning import defaults, estimators

    narrowing = settings["method"] if settings["method"] in defaults.TOKENS else "zoodip"
    bounds = {key: defaults.lookup(narrowing, "tiny", "int8")[key] for key in SWITCHES["puts"]}
    part = parameters_of(estimators.ConditioningSubspace) if settings.get("conditioning") else {}
    resolved = defaults.lookup(settings["method"], "tiny", settings["precision"]) | bounds | part | settings
    unused = {key for switch, keys in SWITCHES.items() if not settings.get(switch) for key in keys}
    unused.add("sampling_batch")  # every cell draws in the same batches, and a picture is the same in any
    return {key: value for key, value in resolved.items() if key not in unused}


def parameters_of(kind: Any) -> Settings:
    """A part's settings with their default values."""
    return {key: one.default for key, one in signature(kind).parameters.items()}
