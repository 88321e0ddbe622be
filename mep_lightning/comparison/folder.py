"""A comparison's folder: what is compared, a line for every cell that came to an end, and what is written of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder, held, write_atomically


@dataclass(frozen=True)
class ComparisonFolder:
    """The folder of one comparison, and the place of each thing in it.

    Args:
        root: the folder; it need not exist yet.
    """

    root: Path

    @property
    def described(self) -> Path:
        """What is compared."""
        return self.root / "comparison.json"

    @property
    def settings(self) -> Path:
        """What each method's cells are trained with, and what the subjects are."""
        return self.root / "settings.json"

    @property
    def cells(self) -> Path:
        """A JSON line for every cell that came to an end."""
        return self.root / "cells.jsonl"

    @property
    def photos(self) -> Path:
        """Of embedded subjects."""
        return self.root / "subjects"

    @property
    def logs(self) -> Path:
        """What cells printed."""
        return self.root / "logs"

    @property
    def plans(self) -> Path:
        """What `mep plan` says of each method."""
        return self.root / "plans.json"

    @property
    def table(self) -> Path:
        """table.md; beside it table.csv and table.json."""
        return self.root / "table.md"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.root / "report.html"

    def run(self, method: str, subject: str, seed: int) -> Path:
        """The folder of a cell's run."""
        return self.root / "runs" / method / f"{subject}-{seed}"

    def config(self, method: str, subject: str, seed: int) -> Path:
        """The settings of a cell's run."""
        return RunFolder(self.run(method, subject, seed)).config

    def claim(self, what: Mapping[str, Any]) -> None:
        """Take the folder for a comparison; more methods, subjects or seeds of the same may be added at any time.

        Args:
            what: all that its cells share.

        Raises:
            UserError: the folder holds another comparison, or something else.
        """
        if not self.described.is_file():
            if self.root.is_dir() and not RunFolder(self.root).is_empty:
                raise UserError(f"--out {self.root} holds other things than a comparison: give a new folder.")
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.described, json.dumps(dict(what), indent=2) + "\n")
            return
        try:
            theirs = json.loads(self.described.read_text(encoding="utf-8"))
            different = [key for key in {**what, **theirs} if not _are_same(what.get(key), theirs.get(key))]
        except (ValueError, AttributeError):
            raise UserError(f"{self.described} is damaged: give a new folder.") from None
        if different:
            key = different[0]
            raise UserError(
                f"--out {self.root} holds a comparison with {key} {theirs.get(key)!r}, not {what.get(key)!r}: give "
                "another folder, or the same settings."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else runs cells of this folder meanwhile: each would take the other's half-trained ones for its own.

        Raises:
            UserError: somebody does.
        """
        told = f"--out {self.root}: another `mep compare` is at work there; wait until it is done, or stop it."
        with held(self.root, told):
            yield

    def settle(self, methods: Mapping[str, Mapping[str, Any]], class_words: Mapping[str, str]) -> None:
        """Keep what methods are trained with and what subjects are, so that rows stay of one kind.

        What was said earlier counts once a cell of it has come to something, or is half trained; else what such cells
        left behind is gone, as it is of other settings and of another class word.

        Args:
            methods: what the table calls each -> its settings, by dotted key; those that only one side has are younger
                or older than the folder, and tell nothing.
            class_words: of subjects, by name.

        Raises:
            UserError: the folder's cells of a method were trained otherwise, or those of a subject as something else.
        """
        kept: dict[str, dict[str, Any]] = {"methods": {}, "class_words": {}}
        with suppress(OSError, ValueError):
            read = json.loads(self.settings.read_text(encoding="utf-8"))
            kept |= {part: read[part] for part in kept if isinstance(read.get(part), dict)}
        good = [key for key, record in self.records().items() if "error" not in record]
        half = [path.parts[-4:-2] for path in self.root.glob("runs/*/*/checkpoints/last.ckpt")]
        begun = {method for method, *_ in good} | {method for method, _ in half}
        for method, settings in methods.items():
            now, before = json.loads(json.dumps(settings, default=str)), kept["methods"].get(method, {})
            changed = [key for key in now if key in before and before[key] != now[key]]
            if changed and method in begun:
                key = changed[0]
                raise UserError(
                    f"--methods {method}: the cells of it in {self.root} have {key} {before[key]!r}, not {now[key]!r}: "
                    "give another folder, or the recipe another name."
                )
            if changed:
                shutil.rmtree(self.root / "runs" / method, ignore_errors=True)
            kept["methods"][method] = now
        known = {subject for _, subject, _ in good} | {name.rpartition("-")[0] for _, name in half}
        for subject, word in class_words.items():
            before = kept["class_words"].get(subject, word)
            if before != word and subject in known:
                raise UserError(
                    f"--data: the cells of {subject} in {self.root} were trained as {before!r}, not as {word!r}: give "
                    "another folder."
                )
            if before != word:
                for run in self.root.glob("runs/*/*"):
                    if run.name.rpartition("-")[0] == subject:
                        shutil.rmtree(run, ignore_errors=True)
            kept["class_words"][subject] = word
        write_atomically(self.settings, json.dumps(kept, indent=2) + "\n")

    def records(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        """The last record of every cell, by method, subject and seed; half a line, as a kill leaves it, is none."""
        found = {}
        for line in self._lines():
            try:
                record = json.loads(line)
                found[record["method"], record["subject"], int(record["seed"])] = record
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
        return found

    def _lines(self) -> Iterator[str]:
        if self.cells.is_file():
            yield from self.cells.read_text(encoding="utf-8", errors="replace").splitlines()

    def keep(self, record: Mapping[str, Any]) -> None:
        """Add a cell's record, on the disk when this returns."""
        whole = not self.cells.is_file() or self.cells.read_bytes()[-1:] in (b"", b"\n")
        with open(self.cells, "a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(dict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _are_same(mine: object, theirs: object) -> bool:
    """Whether two settings are one; a path may have been said in another way."""
    if isinstance(mine, str) and isinstance(theirs, str) and mine != theirs:
        path = Path(theirs).expanduser()
        return path.exists() and str(path.resolve()) == mine
    return mine == theirs
