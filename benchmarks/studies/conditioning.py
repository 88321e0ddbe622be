"""`conditioning`: how much of a token's gradient lies in the directions that the text encoder listens to most.

Along Textual Inversion's path on subjects of the tiny world that are not reported: gradients of single draws of photo,
noise and timestep, and their mean, in the first k right singular vectors of the conditioning's Jacobian; beside them
those of the gradients themselves, which no order of single draws can beat, and random directions.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks.rows import Row, row
from benchmarks.trained.quality import photos_of, train
from benchmarks.trained.variants import BACKPROP, resolve
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.draws import Draw
from mep_lightning.estimators import Backprop, ConditioningSubspace
from mep_lightning.tiny.subjects import subject

STEPS = (1, 60, 300)
DIMS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
SHARES = (0.8, 0.9, 0.97, 0.99)


def run(subjects: int = 4, draws: int = 200) -> list[Row]:
    """Shares of the gradient's squared length, means over subjects and places on the path."""
    found: dict[tuple[str, str], list[float]] = {}
    for index in range(subjects):
        for steps in STEPS:
            module, data = trained(index, steps)
            theta = module.adapter.numbered()[0]
            gradients = _gradients(module, data, draws)
            mean = gradients.mean(0, keepdim=True)
            for name, directions in _orders(module, theta, gradients).items():
                for k in DIMS:
                    for what, rows in (("of single draws", gradients), ("of their mean", mean)):
                        case = f"{name}, {k} of {theta.numel()} dimensions"
                        found.setdefault((case, what), []).append(_inside(rows, directions[:k]))
            for share in SHARES:
                basis = _basis(module, theta, share)
                case = f"share {share:g}"
                found.setdefault((case, "dimensions"), []).append(float(len(basis)))
                found.setdefault((case, "of single draws"), []).append(_inside(gradients, basis))
            print(f"subject {index}, after {steps} steps", flush=True)
    return [row("conditioning", case, what, statistics.mean(values), "") for (case, what), values in found.items()]


def _orders(module: PersonalizationModule, theta: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Orthonormal directions [d or less, d], from the one in which most is expected to lie."""
    own = torch.linalg.svd(gradients, full_matrices=False).Vh
    anywhere = torch.linalg.qr(torch.randn(own.shape[1], own.shape[1], generator=torch.Generator().manual_seed(0)))[0]
    return {
        "the conditioning's Jacobian": _basis(module, theta, 1.0),
        "the gradients' own": own,
        "random directions": anywhere.to(own),
    }


def _basis(module: PersonalizationModule, theta: Tensor, share: float) -> Tensor:
    made = ConditioningSubspace(share)
    made.begin(module.adapter, module.base)
    made.prepare(theta)
    assert made.basis is not None
    return made.basis.double()


def _inside(rows: Tensor, directions: Tensor) -> float:
    return ((rows @ directions.T).square().sum() / rows.square().sum()).item()


def _gradients(module: PersonalizationModule, data: SubjectData, draws: int) -> Tensor:
    """Exact, of single draws, float64 [draws, d]."""
    return torch.stack([gradient_of(module, module.draw_at(data.batch(i), 10_000 + i)) for i in range(draws)])


def gradient_of(module: PersonalizationModule, draw: Draw) -> Tensor:
    """A token's exact gradient, float64 [d]."""
    theta = module.adapter.numbered()[0]
    theta.grad = None
    Backprop().backward(lambda members: module.losses(members, draw), [theta])
    assert theta.grad is not None
    return theta.grad.flatten().double()


def trained(index: int, steps: int) -> tuple[PersonalizationModule, SubjectData]:
    """Textual Inversion of a subject that is not reported, after so many steps."""
    who = subject(index, "tune")
    with photos_of(who) as folder:
        data = SubjectData(folder, class_word=who.class_word, seed=0)
        return train(resolve(BACKPROP) | {"max_steps": steps}, data, 0, folder), data
