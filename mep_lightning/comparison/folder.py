"""A comparison's folder: what is compared, a line for every cell that came to an end, and what is written of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
