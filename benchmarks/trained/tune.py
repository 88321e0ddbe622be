"""`tune`: choose a method's values for the embedded base, one axis after the other, on subjects that are not reported.

Every axis tries its candidates with what was best so far, and keeps the one with the highest mean of CLIP-I and DINO.
Trials are cells of the `quality` suite on the `tune` split, kept as they come, so that a stopped search carries on.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, row
from benchmarks.trained.quality import run_cells
from benchmarks.trained.variants import BASELINES, METHODS, Settings

Axis = list[Settings]
START: dict[str, Settings] = {
    "textual_inversion": {"lr": 5e-3, "lr_scheduler": "constant", "max_steps": 600},
    "zoodip": {
        "n": 8,
        "mu": 1e-3,
        "standardize": True,
        "tau": 16,
        "nu": 1e-2,
        "puts_low": 0,
        "puts_high": 1000,
        "lr": 1.2e-2,
        "lr_scheduler": "linear",
        "max_steps": 1_000,
    },
    "dreambooth": {"lr": 1e-4, "max_steps": 400},
    "qlora": {"lr": 1e-3, "max_steps": 500},
    "peqa": {"lr": 1e-5, "max_steps": 400},
    "tuneqdm": {"lr": 1e-5, "max_steps": 400},
    "gf_ti": {"dims": 64, "sigma": 1.0, "max_steps": 600},
}
"""Where a search begins, so that its course does not depend on the defaults that it gave."""
SCALES: list[Axis] = [
    [{"lr": lr} for lr in (3e-6, 1e-5, 3e-5, 1e-4)],
    [{"lr": lr, "max_steps": 1_200} for lr in (3e-6, 1e-5)],
]
AXES: dict[str, list[Axis]] = {
    "textual_inversion": [
        [{"lr": lr} for lr in (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)],
        [{"lr_scheduler": name} for name in ("constant", "linear")],
        [{"max_steps": steps} for steps in (300, 600, 1_000)],
    ],
    "zoodip": [
        [{"standardize": one} for one in (True, False)],
        [{"mu": mu} for mu in (1e-3, 1e-2)],
        [{"puts_low": low, "puts_high": high} for low, high in ((0, 1000), (500, 900), (0, 500))],
        [{"tau": tau} for tau in (16, 64)],
        [
            {"max_steps": steps, "lr": lr, "lr_scheduler": name}
            for steps, lr, name in (
                (1_000, 1.2e-2, "linear"),
                (3_000, 8e-3, "linear"),
                (3_000, 1.6e-2, "linear"),
                (3_000, 4e-3, "constant"),
                (3_000, 8e-3, "constant"),
            )
        ],
        [{"puts_low": low, "puts_high": high} for low, high in ((0, 1000), (200, 800), (100, 600))],
    ],
    "dreambooth": [[{"lr": lr} for lr in (3e-5, 1e-4, 3e-4)]],
    "qlora": [[{"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2)]],
    "peqa": SCALES,
    "tuneqdm": SCALES,
    "gf_ti": [[{"sigma": sigma} for sigma in (0.3, 1.0, 2.0)], [{"dims": dims} for dims in (16, 64, 128)]],
}


def objective(cells: list[dict[str, Any]]) -> float:
    """Mean over cells of (CLIP-I + DINO) / 2."""
    return statistics.mean((cell["clip_i"] + cell["dino"]) / 2 for cell in cells)


def run(method: str, path: Path, **kwargs: Any) -> list[Row]:
    """Searches a method's axes in order.

    Args:
        method: a key of AXES.
        path: JSON lines of the cells.
        kwargs: of `run_cells`.

    Returns:
        A row a trial, its objective; the last one repeats the best's, with its settings.
    """
    rows: list[Row] = []
    best, score = (METHODS | BASELINES)[method] | START[method], -math.inf
    for axis in AXES[method]:
        trials = {" ".join(f"{key}={value}" for key, value in change.items()): best | change for change in axis}
        new = {name: trial for name, trial in trials.items() if trial != best or score == -math.inf}
        cells = run_cells(new, path, split="tune", **kwargs)
        scores = {
            name: objective([c for c in cells if c["variant"] == name]) if name in new else score for name in trials
        }
        rows += [row("tune", f"{method} {name}", "objective", round(value, 5), "") for name, value in scores.items()]
        winner = max(scores, key=scores.__getitem__)
        if scores[winner] > score:
            best, score = trials[winner], scores[winner]
        print(f"{method}: {winner} of {', '.join(f'{name} {v:.4f}' for name, v in scores.items())}", flush=True)
    rows.append(row("tune", method, "objective of the best", round(score, 5), "") | {"settings": best})
    return rows
