"""A comparison's folder: what is compared, a line for every cell that came to an end, and what is written of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder, write_atomically


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
    def methods(self) -> Path:
        """What each method's cells are trained with."""
        return self.root / "methods.json"

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
            if self.root.is_dir() and any(self.root.iterdir()):
                raise UserError(f"--out {self.root} holds other things than a comparison: give a new folder.")
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.described, json.dumps(dict(what), indent=2) + "\n")
            return
        try:
            theirs = json.loads(self.described.read_text(encoding="utf-8"))
            different = [key for key in {**what, **theirs} if theirs.get(key) != what.get(key)]
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
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"--out {self.root}: another `mep compare` is at work there; wait until it is done, or stop it."
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def settle(self, methods: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what methods are trained with, so that their rows stay of one kind.

        What one was trained with earlier counts once it has a cell that came to something, or one that is half trained.

        Args:
            methods: what the table calls each -> its settings, by dotted key; those that only one side has are younger
                or older than the folder, and tell nothing.

        Raises:
            UserError: the folder's cells of a method were trained otherwise.
        """
        kept: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, AttributeError):
            read = json.loads(self.methods.read_text(encoding="utf-8"))
            kept = {method: one for method, one in read.items() if isinstance(one, dict)}
        good = {method for (method, *_), record in self.records().items() if "error" not in record}
        for method, settings in methods.items():
            now, before = json.loads(json.dumps(settings, default=str)), kept.get(method, {})
            changed = [key for key in now if key in before and before[key] != now[key]]
            begun = method in good or any((self.root / "runs" / method).glob("*/checkpoints/last.ckpt"))
            if changed and begun:
                key = changed[0]
                raise UserError(
                    f"--methods {method}: the cells of it in {self.root} have {key} {before[key]!r}, not {now[key]!r}: "
                    "give another folder, or the recipe another name."
                )
            kept[method] = now
        write_atomically(self.methods, json.dumps(kept, indent=2) + "\n")

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
