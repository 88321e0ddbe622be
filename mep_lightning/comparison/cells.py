"""Cells of a comparison, a method on a subject from a seed each: trained and scored as `mep fit` and `mep test` do."""

from __future__ import annotations

import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mep_lightning.comparison.rehearsal import rehearse
from mep_lightning.errors import TooLargeError, UserError, is_out_of_memory
from mep_lightning.run_folder import RunFolder, held, write_atomically

SCORES = ("clip_t", "clip_i", "dino", "dino_inter")
"""What `mep test` scores, by the keys of metrics.json."""
NO_PLAN = "--no-plan"
"""The word of `mep fit` that is no setting: whether memory is looked at first."""
STOPPED = 128
"""Exit statuses from here on say that a signal came."""
RECORD, TRAINED = "cell.json", "trained.json"
"""In a run's folder, what came of its cell, as whoever waited for it may be gone when it is done; and what its training
took, as its scoring may fail and be tried again.
"""

PATIENCE = 120.0
"""Seconds to wait for whoever still trains a cell: a node that is lost to others keeps its locks for a while."""


@dataclass(frozen=True)
class Cell:
    """What to run.

    Attributes:
        method: as the table calls it.
        subject: its name.
        seed: of everything that is drawn.
        run: the run's folder.
        fit, test: the words of `mep fit` and `mep test`.
    """

    method: str
    subject: str
    seed: int
    run: Path
    fit: Sequence[str]
    test: Sequence[str]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method, self.subject, self.seed

    @property
    def name(self) -> str:
        return f"{self.method} on {self.subject} #{self.seed}"


Batch = Sequence[Cell]
"""Cells of one method and seed that train together; one alone is such, too."""


def batches(cells: Sequence[Cell], sizes: Mapping[str, int]) -> list[list[Cell]]:
    """Cells in the batches that train together, those whose first cell comes first ahead.

    Args:
        cells: what is to be run.
        sizes: method -> how many train together at most; of others each trains alone.
    """
    found: list[list[Cell]] = []
    begun: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        batch = begun.get((cell.method, cell.seed))
        if batch is None or len(batch) >= sizes.get(cell.method, 1):
            batch = begun[cell.method, cell.seed] = []
            found.append(batch)
        batch.append(cell)
    return found


def halves(batch: Batch) -> list[Batch]:
    """What is tried next of a batch that failed: one cell's mistake, or too little memory, is not the others' end."""
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]


class Interrupted(Exception):
    """A signal came; what was trained is kept, and carried on with the next time."""


def run(batch: Batch, log: Callable[[Cell], None] = lambda cell: None) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train and score cells, those that are at the same step together; what is there of an earlier try is gone on from.

    Args:
        batch: what to run. Where it cannot train together its halves do, and in the end each cell alone.
        log: told of a cell before anything is printed that is its own.

    Yields:
        A cell with its scores, bytes, seconds and steps, or `error` (a sentence) and `kind` ("memory" or "failed").

    Raises:
        Interrupted: by a signal.
    """
    left: dict[int | None, list[Cell]] = {}
    for cell in batch:
        if (cell.run / RECORD).is_file():
            yield cell, _tried(partial(_kept, cell))
        else:
            left.setdefault(_step(cell), []).append(cell)
    for cells in left.values():
        yield from _run(cells, log)


def _kept(cell: Cell) -> dict[str, Any]:
    """The record of a cell that is done."""
    return json.loads((cell.run / RECORD).read_text())


def _step(cell: Cell) -> int | None:
    """Where its training stands; None where the checkpoint is damaged."""
    from mep_lightning.commands.training import step_of

    with suppress(UserError):
        return step_of(RunFolder(cell.run).last_checkpoint)
    return None


def _run(batch: Batch, log: Callable[[Cell], None]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train cells that are at the same step, and score each."""
    for cell in batch[1:]:
        log(cell)
        print(f"Trains together with {batch[0].name}, in whose log it is told.")
    log(batch[0])
    trained = _tried(partial(_train, batch))
    if "error" not in trained:
        for cell in batch:
            log(cell)
            yield cell, _tried(partial(_score, cell, trained))
    elif len(batch) == 1:
        yield batch[0], trained
    else:
        print(f"{len(batch)} cells cannot train together ({trained['error']}): their halves are tried.", flush=True)
        gc.collect()  # an exception's frames hold a step's activations, in cycles
        for half in halves(batch):
            yield from _run(half, log)


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What came of some work, or `error` and `kind`.

    Raises:
        Interrupted: by a signal.
    """
    from mep_lightning.cli import sentence_about

    try:
        return work()
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted from None
    except Exception as error:
        traceback.print_exc()
        told = sentence_about(error, "fit")
        sentence = told[0] if told else f"{type(error).__name__}: {error}"
        is_short = isinstance(error, TooLargeError) or is_out_of_memory(error)
        return {"error": " ".join(sentence.split()), "kind": "memory" if is_short else "failed"}


def _train(batch: Batch) -> dict[str, Any]:
    """Train cells; each one's share of what it took: `steps`, `steps_per_second` and `minutes`."""
    from mep_lightning.commands import fit, together
    from mep_lightning.phases import Stopwatch

    begun = all(map(_is_begun, batch))
    for cell in batch:
        with held(cell.run, f"another process still trains in {cell.run}: end it, and use --retry.", PATIENCE):
            if not begun:
                shutil.rmtree(cell.run, ignore_errors=True)
    rehearse()
    lines = [_resumption(cell) if begun else cell.fit for cell in batch]
    started = time.monotonic()
    with Stopwatch() as watch:
        status = fit.run(lines[0]) if len(batch) == 1 else together.train(lines)
    if status >= STOPPED:
        raise Interrupted
    rate = watch.steps_per_second
    trained = {
        "steps": None if begun else watch.steps,
        "steps_per_second": None if rate is None else len(batch) * rate,
        "minutes": None if begun else (time.monotonic() - started) / 60 / len(batch),
    }
    if watch.steps or not begun:  # else it came to its end earlier
        for cell in batch:
            write_atomically(cell.run / TRAINED, json.dumps(trained) + "\n")
    return trained


def _is_begun(cell: Cell) -> bool:
    """Whether there is something to go on from: a checkpoint, or what is made ahead of the first step."""
    run = RunFolder(cell.run)
    return run.last_checkpoint.is_file() or (run.config.is_file() and (run.activations.is_dir() or run.prior.is_dir()))


def _resumption(cell: Cell) -> list[str]:
    """The words that carry a cell's training on; all but this one are in its folder."""
    return ["--run", str(cell.run), "--resume", *(word for word in cell.fit if word == NO_PLAN)]


def _trained(cell: Cell) -> dict[str, Any] | None:
    """What its training took, now or earlier."""
    with suppress(OSError, ValueError):
        return json.loads((cell.run / TRAINED).read_text())
    return None


def _score(cell: Cell, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Draw and score what a cell has learned, and keep its record."""
    from mep_lightning.commands import test
    from mep_lightning.phases import Stopwatch

    folder = RunFolder(cell.run)
    with Stopwatch() as drawing:
        test.run(cell.test)
    measured = _measured(folder)
    pictures = len(list((folder.root / "evaluation").glob("*.png")))
    scores = json.loads(folder.metrics.read_text())
    record = {
        **{name: scores[name] for name in SCORES},
        **measured,
        "storage": sum(path.stat().st_size for path in _exported(folder)),
        **(_trained(cell) or trained),
        "seconds_per_image": drawing.seconds["sample"] / max(pictures, 1),
    }
    write_atomically(cell.run / RECORD, json.dumps(record) + "\n")
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # what is learned is exported
    return record


def _measured(folder: RunFolder) -> dict[str, Any]:
    """Bytes at the peak of training and of drawing, on which device, and of how many that trained together."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        memory: Mapping[str, Any] = json.loads(folder.memory_json.read_text())
        phases: Mapping[str, Any] = memory["phases"]
        training = [figures["peak_bytes"] for name, figures in phases.items() if name != "sample"]
        drawing = phases.get("sample", {}).get("peak_bytes")
        taken = {"training_bytes": max(training), "inference_bytes": drawing}
        return {"batch": memory.get("subjects", 1), **taken, "device": memory.get("device")}
    return {"batch": None, "training_bytes": None, "inference_bytes": None, "device": None}


def _exported(folder: RunFolder) -> list[Path]:
    """What must be kept of a subject: one file, where the same is there in several formats."""
    files = sorted(path for path in folder.adapter.rglob("*.safetensors"))
    return [path for path in files if path.name != "lora_kohya.safetensors"]
