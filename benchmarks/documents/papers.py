"""What the papers report, to stand beside what is measured here: their tables, by the names that ours have.

ZOODiP: arXiv 2503.14868, SD1.5 on DreamBooth's set. Hollowed Net: arXiv 2411.01179, SD2.1 on the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """A paper's table.

    Attributes:
        name: as the paper calls it.
        rows: a variant of a suite here -> scores.
    """

    name: str
    rows: Mapping[str, Scores]


def _scores(clip_t: float, clip_i: float, dino: float, dino_inter: float | None = None) -> dict[str, float]:
    inter = {} if dino_inter is None else {"dino_inter": dino_inter}
    return {"clip_t": clip_t, "clip_i": clip_i, "dino": dino, **inter}


COMPARISON = Table(
    "ZOODiP's Tables 1 and S9",
    {
        "dreambooth": _scores(0.281, 0.782, 0.592, 0.825),
        "qlora": _scores(0.297, 0.762, 0.607, 0.731),
        "peqa": _scores(0.275, 0.791, 0.604, 0.806),
        "tuneqdm": _scores(0.289, 0.788, 0.555, 0.778),
        "textual_inversion": _scores(0.285, 0.778, 0.559, 0.679),
        "gf_ti": _scores(0.253, 0.540, 0.011, 0.150),
        "zoodip": _scores(0.287, 0.772, 0.558, 0.671),
    },
)
SPEED = Table(
    "ZOODiP's Table 2",
    {
        method: {"steps_per_second": speed}
        for method, speed in (("textual_inversion", 9.42), ("tuneqdm", 4.94), ("gf_ti", 0.74), ("zoodip", 16.1))
    },
)
MINUTES = Table(
    "ZOODiP's Table S10",
    {
        method: {"minutes": minutes}
        for method, minutes in (
            ("dreambooth", 2),
            ("qlora", 1.1),
            ("peqa", 1.5),
            ("tuneqdm", 1.4),
            ("textual_inversion", 8.8),
            ("gf_ti", 293),
            ("zoodip", 31),
        )
    },
)
MEMORY = {
    "dreambooth": 19.4,
    "qlora": 7.56,
    "peqa": 6.31,
    "tuneqdm": 8.96,
    "textual_inversion": 6.75,
    "gf_ti": 2.37,
    "zoodip": 2.37,
    "zoodip, int4": 1.9,
}
"""GB while training SD1.5 at 512 px, of nvidia-smi: ZOODiP's Table 1, and its text for int4."""
STORAGE = {
    "dreambooth": 3438,
    "qlora": 1.63,
    "peqa": 1.32,
    "tuneqdm": 2.48,
    "textual_inversion": 0.003,
    "gf_ti": 0.003,
    "zoodip": 0.003,
}
"""MB of what is kept of a subject: ZOODiP's Table 1."""
PARTS = Table(
    "ZOODiP's Table 3",
    {
        "no SG": _scores(0.273, 0.736, 0.505),
        "SG": _scores(0.265, 0.747, 0.527),
        "PUTS 500..900, no SG": _scores(0.277, 0.744, 0.562),
        "SG, PUTS 500..900": _scores(0.266, 0.759, 0.569),
    },
)
SETTINGS = {
    32: (0.704, 0.686, 0.716, 0.729),
    64: (0.721, 0.736, 0.712, 0.724),
    128: (0.736, 0.735, 0.759, 0.716),
    256: (0.739, 0.727, 0.738, 0.716),
    512: (0.705, 0.704, 0.676, 0.707),
}
"""CLIP-I by tau and, in a row, nu = 1e-1, 1e-2, 1e-3, 1e-4: ZOODiP's Table 4, of its subject "shiny sneaker"."""
SAMPLING = Table(
    "ZOODiP's Table 5",
    {
        "SG": _scores(0.265, 0.747, 0.527),
        "SNR timesteps": _scores(0.271, 0.719, 0.545),
        "SG, PUTS 500..900": _scores(0.266, 0.759, 0.569),
    },
)
ESTIMATORS = Table(
    "ZOODiP's Table S4",
    {
        "SG": _scores(0.266, 0.759, 0.569),
        "SPSA": _scores(0.277, 0.732, 0.506),
        "one-point, differences": _scores(0.296, 0.703, 0.393),
    },
)
OF_ONE_SUBJECT = (PARTS, SAMPLING, ESTIMATORS)
"""Tables of the paper's subject "shiny sneaker" alone; Table S4's first line is the last of Table 3."""
STEPS = Table(
    "ZOODiP's Table S5",
    {
        "μ 1e-2": _scores(0.281, 0.778, 0.599),
        "SG": _scores(0.277, 0.797, 0.613),
        "μ 1e-4": _scores(0.296, 0.724, 0.470),
    },
)
DIRECTIONS = Table(
    "ZOODiP's Table S6",
    {
        "n=1": _scores(0.298, 0.736, 0.495),
        "n=2": _scores(0.277, 0.796, 0.613),
        "n=4": _scores(0.282, 0.784, 0.584),
        "SG": _scores(0.282, 0.798, 0.627),
    },
)
NARROWING = Table(
    "ZOODiP's Table S7",
    {
        "dreambooth": _scores(0.266, 0.853, 0.751),
        "dreambooth, 500..1000": _scores(0.272, 0.854, 0.758),
        "0..1000": _scores(0.241, 0.798, 0.584),
        "500..1000": _scores(0.247, 0.825, 0.661),
    },
)
PRECISIONS = Table(
    "ZOODiP's Table S8",
    {"int8": _scores(0.288, 0.834, 0.657), "int4": _scores(0.212, 0.835, 0.647)},
)
LORAS = Table(
    "Hollowed Net's table",
    {
        "dreambooth": _scores(0.302, 0.802, 0.663),
        "lora": _scores(0.299, 0.806, 0.658),
        "lora_r1": _scores(0.314, 0.738, 0.516),
        "hollowed 43%": _scores(0.300, 0.805, 0.660),
    },
)
TABLES = {
    "compare:paper": COMPARISON,
    "compare:speed": SPEED,
    "compare:minutes": MINUTES,
    "ablation:parts": PARTS,
    "ablation:sampling": SAMPLING,
    "ablation:estimators": ESTIMATORS,
    "ablation:mu": STEPS,
    "ablation:directions": DIRECTIONS,
    "timesteps:narrowing": NARROWING,
    "precision:precisions": PRECISIONS,
    "loras:paper": LORAS,
}
"""SUITE:PART -> the table that stands beside ours. On tiny ZOODiP draws all timesteps, so "SG" is its own best."""
