"""Sample pictures while training: the same prompts and seeds before, during and after, in grids to compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from mep_lightning import defaults
from mep_lightning.errors import SEEDS, UserError, is_out_of_memory, refuse_unless
from mep_lightning.evaluation import grid
from mep_lightning.evaluation.generate import SAMPLING, evaluating, generate
from mep_lightning.evaluation.prompts import prompts_for
from mep_lightning.run_folder import RunFolder
from mep_lightning.templates import fill

NEVER = -1


class Samples(Callback):
    """Write `samples/` in the run's folder: photos, before, step-000500 …, after, and before_after beside the photos.

    Training is not disturbed: random state and module modes are as before when a grid is done, so the run is bitwise
    the same with and without samples. Grids also go to every logger that takes pictures.

    Args:
        every: steps between the grids in training; 0 for before and after alone.
        prompts: one picture each; `{}` (or `{0} {1}`) is where the subject goes. By default `count` of the evaluation
            prompts, evenly spread over those that put the subject somewhere.
        count: pictures in a grid when `prompts` is None.
        seed: picture i starts from the noise of seed + i.
        steps: denoising steps; "auto" is the base's own number.
        guidance: the guidance scale; "auto" is the base's own.
        batch_size: pictures denoised at once; "auto" is one, but more for a small base.
    """

    def __init__(
        self,
        every: int = 500,
        prompts: Sequence[str] | None = None,
        count: int = 4,
        seed: int = 0,
        steps: int | Literal["auto"] = "auto",
        guidance: float | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        if every < 0:
            raise UserError(f"Samples every is {every}: set it to 0 (before and after only) or more.")
        if prompts is not None and not prompts:
            raise UserError("Samples prompts is empty: give at least one prompt or leave it out.")
        if prompts is None and count < 1:
            raise UserError(f"Samples count is {count}: set it to 1 or more, or leave the callback out.")
        refuse_unless(0 <= seed < SEEDS, "samples.seed", seed, f"0 to {SEEDS - 1}")
        refuse_unless(isinstance(steps, str) or steps >= 1, "samples.steps", steps, "1 or more, or auto")
        refuse_unless(isinstance(guidance, str) or math.isfinite(guidance), "samples.guidance", guidance, "a number")
        few = isinstance(batch_size, str) or batch_size >= 1
        refuse_unless(few, "samples.batch_size", batch_size, "1 or more, or auto")
        self.every, self.prompts, self.count, self.seed = every, prompts, count, seed
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self._shown_at = NEVER

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse prompts that would show nothing of what is learned, before anything is loaded."""
        adapter = getattr(pl_module, "adapter", None)
        if adapter is None and stage == "fit":
            raise UserError(
                f"Samples draws what one adapter learned; {type(pl_module).__name__} has none: leave it out"
            )
        token = getattr(adapter, "token", None)
        for template in self.prompts or []:
            if token is not None and token not in fill(template, token, ""):
                raise UserError(f"samples.prompts: {template!r} lacks the subject; put {{}} or {token} where it goes.")

        will_draw: Any = getattr(pl_module, "will_draw", None)
        if stage == "fit" and will_draw is not None:
            will_draw(self.texts(trainer, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse more steps than the base's schedule has, before training."""
        scheduler = getattr(getattr(pl_module, "base", None), "scheduler", None)
        if scheduler is not None and not isinstance(self.steps, str):
            total = len(scheduler.alphas_cumprod)
            refuse_unless(self.steps <= total, "samples.steps", self.steps, f"{total}, the base's timesteps, or less")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The photos, and what the untrained adapter makes of the prompts; a resumed run keeps its first pictures."""
        self._shown_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        photos = self._photos(trainer)
        if photos:
            rows = [grid.Row("", photos[start : start + 6]) for start in range(0, len(photos), 6)]
            grid.save(grid.draw(rows), self._folder(trainer) / "photos.png")
        if trainer.global_step == 0:
            self._show(trainer, pl_module, "before")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A grid every so many steps; the last one is left to `after`."""
        step = trainer.global_step
        if not self.every or step % self.every or step == self._shown_at or step == trainer.max_steps:
            return
        self._shown_at = step
        if trainer.is_global_zero:
            self._show_if_it_fits(trainer, pl_module, f"step-{step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was learned, beside what was there before."""
        if trainer.is_global_zero and self._show_if_it_fits(trainer, pl_module, "after"):
            self._compare(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was killed after its last step has nothing to train when it is resumed, and this to draw."""
        if self._shown_at == NEVER:
            self.on_train_end(trainer, pl_module)

    def texts(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """The prompts of this run with the subject filled in."""
        class_word = _class_word(trainer, pl_module)
        templates: Sequence[str]
        if self.prompts is not None:
            templates = self.prompts
        else:
            is_style = _is_style(trainer, pl_module)
            known = prompts_for(class_word or "", getattr(pl_module, "family", None), is_style)
            # A recoloured subject is hard to compare with the photos, so `a red …` is left to the evaluation.
            known = tuple(prompt for prompt in known if prompt.startswith("a {0}")) or known
            count = min(self.count, len(known))
            templates = [known[round(i * (len(known) - 1) / max(count - 1, 1))] for i in range(count)]
        adapter: Any = pl_module.adapter
        return [fill(template, adapter.phrase(class_word), class_word) for template in templates]

    def _show(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        prompts = self.texts(trainer, pl_module)
        seeds = [self.seed + number for number in range(len(prompts))]
        known = SAMPLING | defaults.of(pl_module)
        with isolate_rng(), evaluating(pl_module):
            images = generate(
                pl_module,
                prompts,
                seeds,
                steps=known["sampling_steps"] if self.steps == "auto" else self.steps,
                guidance=known["guidance"] if self.guidance == "auto" else self.guidance,
                batch_size=known["sampling_batch"] if self.batch_size == "auto" else self.batch_size,
            )
        step = trainer.global_step
        heading = f"{name} (step {step})" if name in ("before", "after") else f"step {step}"
        drawn = grid.draw([grid.Row(heading, images, prompts)], step=step, prompts=prompts, seeds=seeds)
        grid.save(drawn, self._folder(trainer) / f"{name}.png")
        _log(trainer, drawn.image, step)

    def _show_if_it_fits(self, trainer: Trainer, pl_module: LightningModule, name: str) -> bool:
        """Pictures are no reason to lose a training run: out of memory is a warning here."""
        try:
            self._show(trainer, pl_module, name)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rank_zero_warn(f"No memory was left for the samples {name}.png; set the callback's batch_size lower.")
            return False
        return True

    def _compare(self, trainer: Trainer) -> None:
        """before_after.png: photos, before and after under one another, a column a prompt."""
        folder = self._folder(trainer)
        before, after = grid.load(folder / "before.png"), grid.load(folder / "after.png")
        if before is None or after is None or before.info.get("prompts") != after.info.get("prompts"):
            return
        columns = len(after.cells())
        photos = self._photos(trainer)[:columns]
        rows = [grid.Row("photos", photos)] if photos else []
        rows.append(grid.Row(f"before (step {before.info['step']})", before.cells()))
        rows.append(grid.Row(f"after (step {after.info['step']})", after.cells(), after.info["prompts"]))
        grid.save(grid.draw(rows, prompts=after.info["prompts"]), folder / "before_after.png")

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return RunFolder(Path(trainer.default_root_dir)).samples

    @staticmethod
    def _photos(trainer: Trainer) -> list[Image.Image]:
        """The photos as the model sees them, where the data module can show them so."""
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "thumbnails"):
            resolution = getattr(getattr(trainer.lightning_module, "base", None), "resolution", grid.LARGEST)
            return list(data.thumbnails(min(resolution, grid.LARGEST)))
        return list(getattr(data, "photos", None) or [])


def _class_word(trainer: Trainer, pl_module: LightningModule) -> str | None:
    data = getattr(trainer, "datamodule", None)  # the module may know that of an earlier fit
    return getattr(data, "class_word", None) or getattr(pl_module, "class_word", None)


def _is_style(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the photos share a style: as the data say, for the adapter is told only in the module's `setup`."""
    data = getattr(trainer, "datamodule", None)
    return bool(getattr(getattr(pl_module, "adapter", None) if data is None else data, "is_style", False))


def _log(trainer: Trainer, image: Image.Image, step: int) -> None:
    """Hand a grid to the loggers that take pictures: TensorBoard's way or W&B's."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key="samples", images=[image], step=step)
        elif hasattr(experiment := getattr(logger, "experiment", None), "add_image"):
            experiment.add_image("samples", np.asarray(image), step, dataformats="HWC")  # type: ignore[union-attr]
