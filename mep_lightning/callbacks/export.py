"""The trained adapter in other tools' formats, written when training ends, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mep_lightning.errors import UserError
from mep_lightning.phases import phase
from mep_lightning.run_folder import RunFolder


class Export(Callback):
    """Write `adapter/` in the run's folder when training ends, fails, or is stopped with Ctrl-C.

    The module needs an `adapter` with `export(directory) -> paths`. A run that fails before its first step writes
    nothing: an earlier export stays as it was.
    """

    def __init__(self) -> None:
        self._training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has nothing to export before it trains for hours."""
        if stage == "fit" and not hasattr(getattr(pl_module, "adapter", None), "export"):
            raise UserError(
                f"Export needs a module whose `adapter` has an `export` method; {type(pl_module).__name__} has none:"
                " leave the callback out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a resumed state is restored, and what steps have learned is worth keeping."""
        self._training = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training reached its end."""
        self._training = False
        if trainer.is_global_zero:
            _export(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training failed or was stopped; Lightning calls this for Ctrl-C too, and ignores further ones meanwhile."""
        has_learned = self._training and trainer.global_step > 0  # by now, or before it was resumed
        self._training = False
        if not has_learned or not trainer.is_global_zero:
            return
        try:
            _export(trainer, pl_module)
        except Exception as error:  # the exception on its way is the one that the user must see
            rank_zero_warn(f"The adapter could not be exported ({error}); the last checkpoint holds it.")


def _export(trainer: Trainer, module: Any) -> None:
    with phase("save"):
        module.adapter.export(RunFolder(Path(trainer.default_root_dir)).adapter)
