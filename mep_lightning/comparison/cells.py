"""One cell of a comparison, a method on a subject from a seed: trained and scored as `mep fit` and `mep test` do."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mep_lightning.run_folder import RunFolder, write_atomically

SCORES = ("clip_t", "clip_i", "dino", "dino_inter")
STOPPED = 128
"""Exit statuses from here on say that a signal came."""
RECORD = "cell.json"
"""In a run's folder, what came of its cell: whoever waited for it may be gone when it is done."""


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


class Interrupted(Exception):
    """A signal came; what was trained is kept, and carried on with the next time."""


def run(cell: Cell) -> dict[str, Any]:
    """Train and score; what is there already of an earlier try is gone on from.

    Returns:
        The scores, bytes, seconds and steps, or `error` (a sentence) and `kind` ("memory" or "failed").

    Raises:
        Interrupted: by a signal.
    """
    from mep_lightning.cli import sentence_about

    try:
        return _record(cell)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted from None
    except MemoryError:
        return {"error": "out of memory", "kind": "memory"}
    except Exception as error:
        traceback.print_exc()
        told = sentence_about(error, "fit")
        sentence = told[0] if told else f"{type(error).__name__}: {error}"
        is_memory = type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)
        return {"error": " ".join(sentence.split()), "kind": "memory" if is_memory else "failed"}


def _record(cell: Cell) -> dict[str, Any]:
    from mep_lightning.commands import fit, test
    from mep_lightning.phases import Stopwatch

    folder, kept = RunFolder(cell.run), cell.run / RECORD
    if kept.is_file():
        return json.loads(kept.read_text())
    begun = folder.last_checkpoint.is_file()
    if not begun:
        shutil.rmtree(folder.root, ignore_errors=True)
    started = time.monotonic()
    with Stopwatch() as watch:
        status = fit.run(["--run", str(folder.root), "--resume"] if begun else cell.fit)
    trained = time.monotonic() - started
    if status >= STOPPED:
        raise Interrupted
    with Stopwatch() as drawing:
        test.run(cell.test)
    measured = _measured(folder)
    pictures = len(list((folder.root / "evaluation").glob("*.png")))
    scores = json.loads(folder.metrics.read_text())
    record = {
        **{name: scores[name] for name in SCORES},
        **measured,
        "storage": sum(path.stat().st_size for path in _exported(folder)),
        "steps": None if begun else watch.steps,
        "steps_per_second": watch.steps_per_second,
        "minutes": None if begun else trained / 60,
        "seconds_per_image": drawing.seconds["sample"] / max(pictures, 1),
    }
    write_atomically(kept, json.dumps(record) + "\n")
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # what is learned is exported
    return record


def _measured(folder: RunFolder) -> dict[str, Any]:
    """Bytes that tensors took at the peak of training and of drawing."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        phases: Mapping[str, Any] = json.loads(folder.memory_json.read_text())["phases"]
        training = [figures["peak_bytes"] for name, figures in phases.items() if name != "sample"]
        drawing = phases.get("sample", {}).get("peak_bytes")
        return {"training_bytes": max(training), "inference_bytes": drawing}
    return {"training_bytes": None, "inference_bytes": None}


def _exported(folder: RunFolder) -> list[Path]:
    """What must be kept of a subject: one file, where the same is there in several formats."""
    files = sorted(path for path in folder.adapter.rglob("*.safetensors"))
    return [path for path in files if path.name != "lora_kohya.safetensors"]
