"""Hollowed Net as a callback: the middle of the U-Net is run once beforehand, then freed for the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from mep_lightning.adapters import LoRA
from mep_lightning.data import SubjectData
from mep_lightning.errors import UserError, human, refuse_unless
from mep_lightning.hollow import Hollow
from mep_lightning.run_folder import RunFolder


class HollowedActivations(Callback):
    """Train a LoRA around a hollow in the U-Net (Hollowed Net, arXiv 2411.01179).

    Before training the whole U-Net runs over `samples` draws of photo, noise, timestep and prompt, and what its middle
    answers goes to `activations/` in the run's folder; then the middle leaves memory, and steps go round those draws.

    Args:
        fraction: of the U-Net's parameters to cut out, in (0, 1); the nearest legal cut is taken. The paper finds .39
            harmless on SD2.1. "auto" is what `defaults` holds.
        samples: draws to make ready; "auto" as for fraction.
        folder: where to, instead of the run's own; the same runs may share one, and the first makes it ready.

    Raises:
        UserError: a fraction out of range or far from every legal cut, a module that trains no LoRA, too small a disk,
            or a folder that another run makes ready.
    """

    AUTO: ClassVar[dict[str, str]] = {"fraction": "fraction", "samples": "samples"}

    def __init__(
        self,
        fraction: float | Literal["auto"] = "auto",
        samples: int | Literal["auto"] = "auto",
        folder: str | None = None,
    ) -> None:
        fine = fraction == "auto" or (isinstance(fraction, (int, float)) and 0 < fraction < 1)
        refuse_unless(fine, "HollowedActivations.fraction", fraction, "a share between 0 and 1, or auto")
        few = samples == "auto" or (isinstance(samples, int) and samples >= 1)
        refuse_unless(few, "HollowedActivations.samples", samples, "1 or more, or auto")
        self.fraction, self.samples, self.folder = fraction, samples, folder
        self._asked = fraction, samples

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tell the module, before its base is loaded, that its LoRA goes around a hollow."""
        if stage != "fit":
            return
        if not isinstance(getattr(pl_module, "adapter", None), LoRA):
            raise UserError("HollowedActivations needs a module that trains a LoRA: set model.adapter to LoRA.")
        if not isinstance(getattr(trainer, "datamodule", None), SubjectData):
            raise UserError("HollowedActivations needs SubjectData, whose draws it makes ready: fit with one.")
        if pl_module.selector is not None:
            raise UserError("HollowedActivations is for one branch: leave model.selector out.")
        self.fraction, self.samples = self._asked  # an earlier fit, maybe on another base, has put numbers there
        pl_module.hollow_out(self)
        if getattr(trainer, "fast_dev_run", False):
            pl_module.hollow.samples = 1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stage 1, once every other callback has said what steps draw; then the middle is freed."""
        hollow: Hollow = pl_module.hollow
        root = Path(self.folder) if self.folder else RunFolder(Path(trainer.default_root_dir)).activations
        silent = None if trainer.is_global_zero else True
        with tqdm(total=hollow.samples, desc="Activations", leave=False, disable=silent) as bar:

            def announced(size: int, done: int) -> None:
                rest = f", {done} of {hollow.samples} are there" if done else ""
                if trainer.is_global_zero:
                    bar.write(f"Hollowed Net's first stage writes {human(size)} to {root}{rest}.")

            with pl_module.base.whole():
                hollow.prepare(
                    pl_module,
                    root,
                    trainer.datamodule.batch,  # type: ignore[attr-defined]
                    announced,
                    lambda done: bar.update(done - bar.n),
                )
        if not pl_module.base.freed:
            pl_module.base.free(hollow.inside(pl_module.base))
