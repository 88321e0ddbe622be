"""The papers' four scores as torchmetrics: CLIP-T, CLIP-I, DINO and the diversity DINO_inter.

Every metric takes pictures, or their unit-length embeddings [N, D] where they are at hand already, so that one pass of
an encoder serves several scores. Shapes: N generated pictures, P photos, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from mep_lightning.errors import UserError
from mep_lightning.evaluation.encoders import DEFAULT_CLIP, DEFAULT_DINO, ClipEncoder, DinoEncoder
from mep_lightning.evaluation.prompts import without_token

Pictures = Sequence[Image.Image] | Tensor


class _MeanMetric(Metric):
    """A mean over everything seen: a sum and a count that add up over batches and over processes.

    Args:
        encoder: a checkpoint's name or folder, or an encoder that several metrics share.
        kind: the encoder's class.
        kwargs: torchmetrics' own.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, encoder: Any, kind: type[ClipEncoder] | type[DinoEncoder], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder: Any = encoder if isinstance(encoder, kind) else kind(encoder)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        self.total += scores.double().sum().to(self.total.device)
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN before anything was seen."""
        return (self.total / self.count).float()


class ClipTextAlignment(_MeanMetric):
    """CLIP-T: the mean cosine between each generated picture and its own prompt, the token taken out of it.

    Args:
        clip: a checkpoint's name or folder, or an encoder that several metrics share.
        kwargs: torchmetrics' own.
    """

    def __init__(self, clip: str | Path | ClipEncoder = DEFAULT_CLIP, **kwargs: Any) -> None:
        super().__init__(clip, ClipEncoder, **kwargs)

    def update(self, images: Pictures, texts: Sequence[str] | Tensor) -> None:
        """Add pictures and, for each, its text (or both as embeddings [N, D])."""
        if len(images) != len(texts):
            raise UserError(
                f"{len(images)} pictures cannot be scored against {len(texts)} prompts: give one a picture."
            )
        pictures = _embed(images, self.encoder)  # [N, D]
        words = texts if isinstance(texts, Tensor) else self.encoder.encode_texts(texts)  # [N, D]
        self._add((pictures * words).sum(-1))


class _PhotoAlignment(_MeanMetric):
    """The mean cosine between generated pictures and real photos of one subject, over all pairs."""

    def update(self, images: Pictures, photos: Pictures) -> None:
        """Add generated pictures [N] and the photos [P] of the subject they show; every picture counts the same."""
        pictures, real = _embed(images, self.encoder), _embed(photos, self.encoder)  # [N, D], [P, D]
        self._add((pictures @ real.T).mean(-1))  # [N]


class ClipImageAlignment(_PhotoAlignment):
    """CLIP-I: the mean pairwise cosine of CLIP embeddings between generated pictures and the subject's photos.

    Args:
        clip: a checkpoint's name or folder, or an encoder that several metrics share.
        kwargs: torchmetrics' own.
    """

    def __init__(self, clip: str | Path | ClipEncoder = DEFAULT_CLIP, **kwargs: Any) -> None:
        super().__init__(clip, ClipEncoder, **kwargs)


class DinoAlignment(_PhotoAlignment):
    """DINO: as CLIP-I, with DINO's class token, which tells subjects of one class apart (DreamBooth, section 4.1).

    Args:
        dino: a checkpoint's name or folder, or an encoder that several metrics share.
        kwargs: torchmetrics' own.
    """

    def __init__(self, dino: str | Path | DinoEncoder = DEFAULT_DINO, **kwargs: Any) -> None:
        super().__init__(dino, DinoEncoder, **kwargs)


class DinoDiversity(_MeanMetric):
    """DINO_inter (ZOODiP, Table S9): the mean pairwise cosine among generated pictures; lower is more diverse.

    Each `update` is one group, such as the pictures of one prompt: pairs are taken within it and never across.

    Args:
        dino: a checkpoint's name or folder, or an encoder that several metrics share.
        kwargs: torchmetrics' own.
    """

    higher_is_better = False

    def __init__(self, dino: str | Path | DinoEncoder = DEFAULT_DINO, **kwargs: Any) -> None:
        super().__init__(dino, DinoEncoder, **kwargs)

    def update(self, images: Pictures) -> None:
        """Add one group of generated pictures [N]; its N (N - 1) / 2 pairs count, so a single picture adds nothing."""
        pictures = _embed(images, self.encoder)  # [N, D]
        first, second = torch.triu_indices(len(pictures), len(pictures), offset=1)
        self._add((pictures[first] * pictures[second]).sum(-1))


def evaluate(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    photos: Sequence[Image.Image],
    *,
    clip: str | Path | ClipEncoder = DEFAULT_CLIP,
    dino: str | Path | DinoEncoder = DEFAULT_DINO,
    token: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Score one subject's generated pictures.

    Args:
        images: the generated pictures.
        prompts: the prompt of each.
        photos: the subject's real photos.
        clip: CLIP checkpoint or encoder.
        dino: DINO checkpoint or encoder.
        token: the subject's token, or how prompts name it ("<sks> ball"), taken out of the prompts before they are
            compared with pictures.
        device: where the encoders run.

    Returns:
        `clip_t`, `clip_i`, `dino`: higher is better. `dino_inter`: lower is more diverse; pairs are pictures of one
        prompt, or any two where no prompt has more than one picture (NaN with a single picture).
    """
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} pictures cannot be scored against {len(prompts)} prompts: give one a picture.")
    if not images or not photos:
        raise UserError(f"There is no {'photo' if images else 'generated picture'} to score: give at least one.")
    clip_encoder = (clip if isinstance(clip, ClipEncoder) else ClipEncoder(clip)).to(device)
    dino_encoder = (dino if isinstance(dino, DinoEncoder) else DinoEncoder(dino)).to(device)
    clip_t, clip_i = ClipTextAlignment(clip_encoder), ClipImageAlignment(clip_encoder)
    alignment, diversity = DinoAlignment(dino_encoder), DinoDiversity(dino_encoder)

    in_clip, in_dino = clip_encoder.encode_images(images), dino_encoder.encode_images(images)  # [N, D] each
    clip_t.update(in_clip, [without_token(prompt, token) if token else prompt for prompt in prompts])
    clip_i.update(in_clip, photos)
    alignment.update(in_dino, photos)
    groups = [[i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    if all(len(group) < 2 for group in groups):
        groups = [list(range(len(prompts)))]
    for group in groups:
        diversity.update(in_dino[group])
    scores = {"clip_t": clip_t, "clip_i": clip_i, "dino": alignment, "dino_inter": diversity}
    return {name: float(metric.compute()) for name, metric in scores.items()}


def _embed(pictures: Pictures, encoder: ClipEncoder | DinoEncoder) -> Tensor:
    return pictures if isinstance(pictures, Tensor) else encoder.encode_images(pictures)
