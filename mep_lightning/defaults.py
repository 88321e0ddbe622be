"""What `auto` becomes: values keyed by (method, family, precision), the papers' own but where a comment says why not.

Sources: ZOODiP (arXiv 2503.14868, section 4 and supplement S1) for SD1.5, SD2.1, SDXL and int4; Textual Inversion's
5,000 steps at 5e-3 from the same supplement. LoRA's rank 128 and Hollowed Net's fraction: arXiv 2411.01179.
DreamBooth's 5e-6 and 400 steps: arXiv 2208.12242. A LoRA's learning rate, steps and samples, and the values of
selective optimisation (arXiv 2507.10029, whose own could not be checked) are common practice and not searched. Those of
`tiny` come from subjects that are not reported; docs/reproduction.md says which were searched
(benchmarks/results/tune-*) and which set by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mep_lightning.errors import UserError

METHODS = (
    "zoodip",
    "zoodip_fast",
    "textual_inversion",
    "textual_inversion_lite",
    "lora",
    "lora_r1",
    "hollowed_net",
    "selective",
    "dreambooth",
    "qlora",
    "peqa",
    "tuneqdm",
    "gf_ti",
)
LORAS = ("lora", "lora_r1", "hollowed_net", "selective", "qlora")
SCALES = ("peqa", "tuneqdm")
TOKENS = ("zoodip", "zoodip_fast")
FAMILIES = ("tiny", "sd1", "sd2", "sdxl")

# A later row that matches wins; "*" matches everything.
_TABLE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("*", "*", "*", {"lr_scheduler": "constant", "sampling_batch": 1}),
    ("*", "tiny", "*", {"guidance": 3.0, "sampling_steps": 20, "sampling_batch": 4}),
    ("*", "sd1", "*", {"guidance": 7.5, "sampling_steps": 50}),
    ("*", "sd2", "*", {"guidance": 7.5, "sampling_steps": 50}),
    ("*", "sdxl", "*", {"guidance": 7.5, "sampling_steps": 50}),
    ("zoodip", "*", "*", {"n": 2, "mu": 1e-3, "tau": 128, "nu": 1e-3, "puts_low": 500, "puts_high": 900}),
    ("zoodip", "*", "*", {"lr": 5e-3, "eps": 1e-3, "max_steps": 30_000, "standardize": False}),
    ("zoodip", "sd2", "*", {"lr": 1e-2, "mu": 1e-2}),
    ("zoodip", "sdxl", "*", {"mu": 1e-2, "max_steps": 20_000, "puts_low": 700, "puts_high": 900}),
    # A quarter of ZOODiP's forward passes; tried on `tiny` alone. Four directions take 70 MiB more than two (SD1.5).
    ("zoodip_fast", "*", "*", {"n": 4, "mu": 1e-3, "puts_low": 500, "puts_high": 900}),
    ("zoodip_fast", "*", "*", {"lr": 1e-2, "lr_scheduler": "linear", "eps": 1e-8, "standardize": False}),
    ("zoodip_fast", "*", "*", {"max_steps": 4_500}),
    ("zoodip_fast", "sd2", "*", {"mu": 1e-2}),
    ("zoodip_fast", "sdxl", "*", {"mu": 1e-2, "max_steps": 3_000, "puts_low": 700, "puts_high": 900}),
    ("zoodip_fast", "tiny", "*", {"n": 8, "max_steps": 1_500, "puts_low": 0, "puts_high": 1000}),
    # Half precision drowns the paper's 1e-3 (measured on `tiny`, docs/performance.md), and on a GPU quantised weights
    # meet fp16 activations; the paper itself takes 1e-2 for int4. `tiny` computes in fp32 with either of them.
    *((name, "*", precision, {"mu": 1e-2}) for name in TOKENS for precision in ("fp16", "int8", "int4")),
    *((name, "*", "bf16", {"mu": 3e-2}) for name in TOKENS),
    *((name, "tiny", precision, {"mu": 1e-3}) for name in TOKENS for precision in ("int8", "int4")),
    # A token of tiny has 128 dimensions, not 768 and more: shorter paths, and directions that cost little.
    ("zoodip", "tiny", "*", {"n": 8, "tau": 16, "nu": 1e-2, "puts_low": 0, "puts_high": 1000}),
    ("zoodip", "tiny", "*", {"standardize": True, "max_steps": 6_000}),
    ("textual_inversion", "*", "*", {"lr": 5e-3, "eps": 1e-8, "max_steps": 5_000, "puts_low": 0, "puts_high": 1000}),
    ("textual_inversion", "tiny", "*", {"max_steps": 600}),
    # The same training on a base and in activations that take less.
    ("textual_inversion_lite", "*", "*", {"lr": 5e-3, "eps": 1e-8, "max_steps": 5_000}),
    ("textual_inversion_lite", "*", "*", {"puts_low": 0, "puts_high": 1000}),
    ("textual_inversion_lite", "tiny", "*", {"max_steps": 600}),
    *((name, "*", "*", {"lr": 1e-4, "eps": 1e-8, "max_steps": 1_000, "rank": 128}) for name in LORAS),
    *((name, "*", "*", {"puts_low": 0, "puts_high": 1000}) for name in (*LORAS, "dreambooth")),
    *((name, "tiny", "*", {"rank": 16, "lr": 1e-3, "max_steps": 400}) for name in LORAS),
    ("lora_r1", "*", "*", {"rank": 1}),
    ("hollowed_net", "*", "*", {"fraction": 0.39, "samples": 1_000}),
    ("hollowed_net", "sdxl", "*", {"fraction": 0.33}),  # its cuts lie farther apart
    ("hollowed_net", "tiny", "*", {"fraction": 0.43, "samples": 400}),
    ("selective", "*", "*", {"n": 1, "mu": 1e-3, "standardize": False, "low_resolution": 256}),
    ("selective", "sdxl", "*", {"low_resolution": 512}),
    *(("selective", "*", precision, {"mu": 1e-2}) for precision in ("fp16", "int8", "int4")),
    ("selective", "*", "bf16", {"mu": 3e-2}),
    # Half of tiny's 64 px leaves 2 x 2 latents in the middle of its U-Net.
    ("selective", "tiny", "*", {"low_resolution": 48}),
    *(("selective", "tiny", precision, {"mu": 1e-3}) for precision in ("int8", "int4")),
    ("dreambooth", "*", "*", {"lr": 5e-6, "eps": 1e-8, "max_steps": 400}),
    ("dreambooth", "tiny", "*", {"lr": 1e-4}),
    ("gf_ti", "*", "*", {"population": 20, "dims": 256, "sigma": 1.0, "max_steps": 13_000}),
    ("gf_ti", "*", "*", {"lr": 1.0, "eps": 1e-8, "puts_low": 0, "puts_high": 1000}),
    ("gf_ti", "tiny", "*", {"dims": 128, "max_steps": 600}),
    # ZOODiP's supplement for the methods that it compares with.
    ("qlora", "*", "*", {"rank": 2, "max_steps": 500}),
    ("qlora", "tiny", "*", {"lr": 3e-3}),
    *((name, "*", "*", {"lr": 3e-6, "eps": 1e-8, "max_steps": 400}) for name in SCALES),
    *((name, "tiny", "*", {"lr": 1e-5, "max_steps": 1_200}) for name in SCALES),
    *((name, "*", "*", {"puts_low": 0, "puts_high": 1000}) for name in SCALES),
]


def method_of(adapter: Any, estimator: Any, selector: Any, subspace: Any = None) -> str:
    """The method that a module's parts, or their classes, amount to."""
    kind = (adapter if isinstance(adapter, type) else type(adapter)).__name__
    if kind in ("LoRA", "TokenAndLoRA"):
        return "lora" if selector is None else "selective"
    if kind == "FullUNet":
        return "dreambooth"
    if kind == "QuantizationScales":
        return "tuneqdm" if getattr(adapter, "input_channels", False) is True else "peqa"
    if type(estimator).__name__ == "CMAES":
        return "gf_ti"
    if not estimator.forward_only:
        return "textual_inversion"
    kind = (subspace if isinstance(subspace, type) else type(subspace)).__name__
    return "zoodip_fast" if kind == "ConditioningSubspace" else "zoodip"


def lookup(method: str, family: str, precision: str, activations: str = "auto") -> dict[str, Any]:
    """All default values of a method on a family of bases in a precision.

    Args:
        method, family, precision: what the table is keyed by.
        activations: where they are said they stand in for the precision, which is in the table for its rounding alone.

    Returns:
        lr, lr_scheduler, eps, max_steps, puts_low, puts_high, guidance, sampling_steps and sampling_batch; also n, mu,
        standardize, tau and nu, rank, fraction and samples, or low_resolution, where the method has them.

    Raises:
        UserError: the method or family is unknown.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if family not in FAMILIES:
        raise UserError(f"base family {family!r} is unknown: choose one of {', '.join(FAMILIES)}")
    precision = precision if activations == "auto" else activations
    values: dict[str, Any] = {}
    for row_method, row_family, row_precision, row in _TABLE:
        if row_method in ("*", method) and row_family in ("*", family) and row_precision in ("*", precision):
            values |= row
    return values


def of(module: Any) -> dict[str, Any]:
    """`lookup` for the method and the base of a module; empty where it has none."""
    method, base = getattr(module, "method", None), getattr(module, "base", None)
    known = isinstance(method, str) and hasattr(base, "family") and hasattr(base, "precision")
    return lookup(str(method), base.family, base.precision) if known else {}  # type: ignore[union-attr]


def fill_in(part: object, values: Mapping[str, Any], method: str) -> None:
    """Replace every "auto" among a part's settings, in place.

    Args:
        part: its class names in `AUTO` the settings that may be "auto", each with its column in the table.
        values: what `lookup` answered.
        method: whose values they are; named in the message.

    Raises:
        UserError: a setting is "auto", and the method has no value for it.
    """
    for setting, column in getattr(part, "AUTO", {}).items():
        if getattr(part, setting) == "auto":
            setattr(part, setting, value(values, column, f"{type(part).__name__}.{setting}", method))


def value(values: Mapping[str, Any], column: str, setting: str, method: str) -> Any:
    """One of the values that `lookup` answered with, for a setting that is "auto".

    Raises:
        UserError: there is none.
    """
    if column not in values:
        raise UserError(f"{setting} is auto, and {method} has no default for it: give it a value.")
    return values[column]
