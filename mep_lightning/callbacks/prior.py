"""Prior preservation (DreamBooth, arXiv 2208.12242): the class is trained on beside the subject, and not lost."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from mep_lightning import defaults
from mep_lightning.data import SubjectData
from mep_lightning.errors import UserError, refuse_unless
from mep_lightning.evaluation.generate import generate
from mep_lightning.photos import find_photos, holds_photos
from mep_lightning.run_folder import RunFolder, replacing

PROMPT = "a photo of a {}"


class PriorPreservation(Callback):
    """Draw pictures of the class with the untrained base, and train on one beside every photo.

    Args:
        images: how many pictures of the class; those that the folder lacks are drawn.
        weight: of their loss.
        folder: of pictures of the class; `prior/` in the run's folder by default.
    """

    def __init__(self, images: int = 100, weight: float = 1.0, folder: str | None = None) -> None:
        refuse_unless(images >= 1, "PriorPreservation.images", images, "1 or more")
        refuse_unless(weight >= 0, "PriorPreservation.weight", weight, "0 or more")
        self.images, self.weight, self.folder = images, weight, folder

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Let the module know which prompt will be trained on and drawn."""
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "fit":
            return
        if not isinstance(data, SubjectData) or not hasattr(pl_module, "will_draw"):
            raise UserError("PriorPreservation needs a PersonalizationModule and SubjectData: fit with them.")
        if data.class_word is None:
            raise UserError("PriorPreservation needs data.class_word: say in a word what the photos show, such as dog")
        self.prompt = PROMPT.format(data.class_word)
        pl_module.will_draw([self.prompt])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what is missing, before anything is trained, and encode it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        root = Path(self.folder) if self.folder else RunFolder(Path(trainer.default_root_dir)).prior
        have = _count(root)
        free = (number for number in itertools.count() if not (root / f"{number:05d}.png").exists())
        lacking = list(itertools.islice(free, max(self.images - have, 0)))  # those that are there keep their names
        module.ranks.wait()  # until all have counted
        if have < self.images:
            with ExitStack() as untrained:
                try:
                    untrained.enter_context(module.adapter.away())
                except UserError as error:
                    what = f"{root} lacks {len(lacking)} of {self.images} pictures of the class"
                    raise UserError(f"{what}, and {error}: put them back, or start anew") from None
                self._draw(module, root, lacking)
        module.ranks.wait()
        photos = find_photos(root)[: self.images]
        with torch.no_grad():
            data.add_prior(module.base, photos, self.prompt)
        module.prior_weight = self.weight

    def _draw(self, module: Any, root: Path, numbers: list[int]) -> None:
        known = defaults.of(module)
        numbers = numbers[module.ranks.rank :: module.ranks.world]  # processes take turns
        at_once = known["sampling_batch"]
        for start in range(0, len(numbers), at_once):
            seeds = [module.seed + 2**32 + number for number in numbers[start : start + at_once]]
            pictures = generate(
                module,
                [self.prompt] * len(seeds),
                seeds,
                steps=known["sampling_steps"],
                guidance=known["guidance"],
                batch_size=at_once,
            )
            for number, picture in zip(numbers[start:], pictures, strict=False):
                _save(picture, root / f"{number:05d}.png")


def _count(root: Path) -> int:
    return len(find_photos(root)) if holds_photos(root) else 0


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
