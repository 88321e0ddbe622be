"""`paths`: how tokens get where they go, on subjects of the tiny world: fast or slowly, and in how few dimensions.

Of every run the held-out loss after so many forward passes (ZOODiP's Figure S5, with a number in the place of a
picture), the share of its path's dimensions that Subspace Gradient keeps (its Figure 8), and how good the learned token
still is when only a few of its components are left: those of the vocabulary that it moved most along, where the rest is
what it began with (its Figure 3), or the first of its path.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.rows import Row, row
from benchmarks.trained.quality import heldout_loss, photos_of, quiet, train
from benchmarks.trained.variants import BACKPROP, FAST, ZOODIP, Settings, resolve
from mep_lightning import SubjectData
from mep_lightning.tiny.subjects import Subject, subject

BUDGET = 13_500
"""Forward passes: a quarter of ZOODiP's."""
MARKS = (450, 900, 1_800, 3_600, 5_400, 7_200, 10_200, BUDGET)
DIMS = (1, 2, 4, 8, 16, 32, 64, 128)
COMPONENTS = ("components of the vocabulary", "components of its path")
NAIVE: Settings = ZOODIP | {"sg": False, "standardize": False, "eps": 1e-8, "max_steps": BUDGET // 9}
RUNS: dict[str, tuple[Settings, int]] = {
    "textual_inversion": (BACKPROP, 3),
    "naive ZO": (NAIVE, 9),
    "zoodip": (ZOODIP | {"max_steps": BUDGET // 9}, 9),
    "zoodip, the paper's τ and ν": (ZOODIP | {"max_steps": BUDGET // 9, "tau": 128, "nu": 1e-3}, 9),
    "zoodip_fast": (FAST, 9),
}
"""What is run, and what a step of it counts as in forward passes: a backward pass as two."""


class Watch(Callback):
    """Notes a run's path, its loss at the marks, and what its subspace keeps.

    Args:
        who: whose unseen photos the loss is of.
        passes: of a step.
    """

    def __init__(self, who: Subject, passes: int) -> None:
        self.who, self.passes = who, passes
        self.start = torch.zeros(0)
        self.path: list[Tensor] = []
        self.losses: dict[int, float] = {}
        self.kept: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.start = module.adapter.theta.detach().flatten().double().clone()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.path.append(module.adapter.theta.detach().flatten().double().clone())
        done = trainer.global_step * self.passes
        for mark in MARKS:
            if done >= mark and mark not in self.losses:
                self.losses[mark] = heldout_loss(module, self.who)
        subspace = module.subspace
        if getattr(subspace, "rank_kept", 0) and subspace.seen % subspace.tau == 0:
            self.kept.append(subspace.rank_kept / subspace.tau)


def run(subjects: int = 3, workers: int = 2) -> list[Row]:
    """Means over subjects; every run in one of so many processes of one thread each."""
    found: dict[tuple[str, str], list[float]] = {}
    cells = [(index, name) for index in range(subjects) for name in RUNS]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for figures in pool.map(_figures, *zip(*cells, strict=True)):
            for case, metric, value in figures:
                found.setdefault((case, metric), []).append(value)
    return [row("paths", case, metric, statistics.mean(values), "") for (case, metric), values in found.items()]


def _figures(index: int, name: str) -> list[tuple[str, str, float]]:
    """Case, metric and value of what one run on one subject shows."""
    quiet()
    torch.set_num_threads(1)
    who, (settings, passes) = subject(index), RUNS[name]
    with photos_of(who) as folder:
        watch = Watch(who, passes)
        data = SubjectData(folder, class_word=who.class_word, seed=0)
        module = train(resolve(settings), data, 0, f"{folder}/kept", [watch])
        found = [(f"{name}, {mark} forward passes", "held-out loss", loss) for mark, loss in watch.losses.items()]
        found += [(name, "share of the path's dimensions kept", share) for share in watch.kept]
        if name in ("textual_inversion", "zoodip_fast"):
            start, path = watch.start, torch.stack(watch.path)
            moved = path[-1] - start
            words = module.adapter.vocabulary(module.base).double()
            bases = most_moved(words, moved), torch.linalg.svd(path - start, full_matrices=False).Vh
            for what, basis in zip(COMPONENTS, bases, strict=True):
                losses = _truncated(module, who, start, basis)
                found += [(f"{name}, {k} {what}", "held-out loss", loss) for k, loss in losses.items()]
    print(f"{who.name}, {name}: {list(watch.losses.values())[-1]:.4f}", flush=True)
    return found


def most_moved(words: Tensor, moved: Tensor) -> Tensor:
    """The principal components of words [N, D], those ahead along which a token has moved most, [D]; [D, D]."""
    components = torch.linalg.eigh(torch.cov(words.T)).eigenvectors.T
    return components[(components @ moved).abs().argsort(descending=True)]


def _truncated(module: Any, who: Subject, start: Tensor, basis: Tensor) -> dict[int, float]:
    """Held-out loss of the learned token when it has moved along the first k rows of a basis alone; 0 is its start."""
    theta = module.adapter.theta
    learned = theta.detach().clone()
    losses = {}
    for k in (0, *DIMS):
        kept = basis[:k]
        values = start + (learned.flatten().double() - start) @ kept.T @ kept
        theta.data.copy_(values.view_as(theta))
        losses[k] = heldout_loss(module, who)
    theta.data.copy_(learned)
    return losses
