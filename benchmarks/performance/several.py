"""`several`: subjects an hour on the embedded base, one at a time beside several in a batch (`SubjectBatch`)."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from benchmarks.rows import Row, median_ratio, row
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.commands.budget import recipe
from mep_lightning.defaults import lookup
from mep_lightning.subject_batch import SubjectBatch, SubjectBatchData
from mep_lightning.tiny.subjects import subject

METHODS = {"zoodip": "int8", "zoodip_fast": "int8", "textual_inversion": "fp32"}
"""Those that train a token by a gradient, and the precision of their recipes."""
COUNTS = (1, 2, 4, 8)
WARM_UP = 3


class Clock(Callback):
    """Seconds of every step, the first few left out, and of what comes before them."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.before = 0.0
        self.steps: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The step before has ended, with all that Lightning does around it."""
        now = time.perf_counter()
        if batch_idx == 0:
            self.before = now - self.began
        if batch_idx > WARM_UP:
            self.steps.append(now - self.last)
        self.last = now


def run(rounds: int = 3, steps: int = 25, methods: Sequence[str] = tuple(METHODS)) -> list[Row]:
    """Rows of every method and number of subjects: seconds a step, of all of them, and subjects an hour.

    An hour holds what comes before the first step, and as many steps as the method takes on `tiny`; no pictures.

    Args:
        rounds: times that every number has its turn.
        steps: of a turn.
        methods: which.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = _photos(Path(folder), max(COUNTS))
        for method in methods:
            clocks: dict[int, list[Clock]] = {count: [] for count in COUNTS}
            for _ in range(rounds):
                for count in COUNTS:
                    clocks[count].append(_fit(method, photos[:count], steps, Path(folder)))
            rows += _rows(method, clocks)
    return rows


def _rows(method: str, clocks: dict[int, list[Clock]]) -> list[Row]:
    total = int(lookup(method, "tiny", METHODS[method])["max_steps"])
    hourly = {
        count: [3600 * count / (clock.before + total * statistics.median(clock.steps)) for clock in own]
        for count, own in clocks.items()
    }
    rows = []
    for count, own in clocks.items():
        case = f"tiny {method}, {count} subject{'s' * (count > 1)} a batch"
        seconds = statistics.median(statistics.median(clock.steps) for clock in own)
        gain = median_ratio(hourly[count], hourly[1])
        rows.append(row("several", case, "seconds a step", seconds, "s"))
        one = statistics.median(hourly[1])
        rows.append(row("several", case, "subjects an hour", statistics.median(hourly[count]), "", one, gain))
        print(f"{case}: {1e3 * seconds:.0f} ms a step, {gain:.2f}x the subjects an hour", flush=True)
    return rows


def _fit(method: str, photos: Sequence[tuple[str, Path]], steps: int, folder: Path) -> Clock:
    modules = [_module(method, seed) for seed in range(len(photos))]
    data = [SubjectData(path, class_word=word) for word, path in photos]
    clock = Clock()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[clock],
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
    )
    if len(photos) == 1:
        trainer.fit(modules[0], data[0])
    else:
        named = {f"{number}": one for number, one in enumerate(data)}
        trainer.fit(SubjectBatch(modules), SubjectBatchData(named))
    return clock


def _module(method: str, seed: int) -> PersonalizationModule:
    module = recipe(method)(METHODS[method], None)
    module.seed = seed
    for one in module.estimators:
        one.seed = seed
    return module


def _photos(folder: Path, count: int) -> list[tuple[str, Path]]:
    """Class word and folder of the first test subjects."""
    found = []
    for index in range(count):
        one = subject(index)
        place = folder / one.name
        place.mkdir()
        for i, photo in enumerate(one.photos()):
            photo.save(place / f"{i}.png")
        found.append((one.class_word, place))
    return found
