"""A run's folder: where everything that a run writes is found."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mep_lightning.errors import UserError

TEMPORARY = ".tmp-"
"""How the names begin of files that are written to be renamed."""
TRIES = 10
"""How often a folder is made that another takes away between its making and its locking."""
LOCK = ".lock"
"""The file that whoever holds a folder has locked; a kill leaves it behind, unlocked."""
FULL = re.compile(r"no space left|os error 28\b|unexpected pos|file write failed|disk quota", re.IGNORECASE)
"""How libraries that write files by themselves tell of a full disk."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the place of each thing in it.

    Args:
        root: the folder; it need not exist yet.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @classmethod
    def new(cls, runs_root: str | Path, method: str) -> RunFolder:
        """Creates `runs_root/<method>-N` with the next free N, so that two runs started at once never share one."""
        runs_root = Path(runs_root)
        runs_root.mkdir(parents=True, exist_ok=True)
        taken = [path.name.removeprefix(f"{method}-") for path in runs_root.glob(f"{method}-*")]
        number = max((int(name) for name in taken if name.isdecimal()), default=0) + 1
        while True:
            root = runs_root / f"{method}-{number}"
            try:
                root.mkdir()
            except FileExistsError:
                number += 1
            else:
                return cls(root)

    @property
    def config(self) -> Path:
        """The run's settings with every `auto` resolved."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Trainables and state; `last.ckpt` is what a resumed run reads."""
        return self.root / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that `--resume` carries on from."""
        return self.checkpoints / "last.ckpt"

    @property
    def adapter(self) -> Path:
        """The exports, ready for other tools."""
        return self.root / "adapter"

    @property
    def activations(self) -> Path:
        """What Hollowed Net's hollow answers, for the training; it may be deleted after it."""
        return self.root / "activations"

    @property
    def prior(self) -> Path:
        """Pictures of the class, for `PriorPreservation`; it may be deleted after the training."""
        return self.root / "prior"

    @property
    def samples(self) -> Path:
        """Grids of generated pictures."""
        return self.root / "samples"

    @property
    def memory_json(self) -> Path:
        """Peak memory of every phase."""
        return self.root / "memory.json"

    @property
    def memory_png(self) -> Path:
        """The same, as a picture."""
        return self.root / "memory.png"

    @property
    def metrics(self) -> Path:
        """The evaluation's scores."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        """What the CSV logger writes: a row a logged step, with `step`, `train/loss` and more."""
        return self.root / "log.csv"

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there yet: no folder, or a folder without a file that was written to its end."""
        if not self.root.exists():
            return True
        return all(path.name.startswith(TEMPORARY) or path.name == LOCK for path in self.root.iterdir())

    def sweep(self) -> None:
        """Remove the half-written files that a kill left behind; nobody else may be writing to the folder."""
        for path in self.root.rglob(f"{TEMPORARY}*") if self.root.is_dir() else ():
            with suppress(OSError):
                path.unlink()


@contextmanager
def held(folder: Path, told: str, patience: float = 0.0) -> Iterator[None]:
    """Nobody else holds this folder meanwhile. It is made where there is none, and gone at the end if nothing is in it.

    A process that is killed lets go of it. Where the file system has no locks, or nothing can be written, nothing is
    held.

    Args:
        folder: to be held.
        told: the sentence for who comes while another holds it.
        patience: seconds to wait for the other.

    Raises:
        UserError: another holds it.
    """
    lock = _locked(folder, told, patience)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()  # while it is held: whoever has opened it then sees that it is gone
            with suppress(OSError):
                lock.release()
        with suppress(OSError):
            folder.rmdir()


def _locked(folder: Path, told: str, patience: float) -> Any:
    """The lock of a folder, which is held from here on; None where there can be none."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    until = time.monotonic() + patience
    for _ in range(TRIES):
        was_there = (folder / LOCK).exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=max(0.0, until - time.monotonic()))
            return lock
        except Timeout:
            raise UserError(told) from None
        except FileNotFoundError:  # whoever held it has left nothing, and has taken the folder away meanwhile
            pass
        except (OSError, NotImplementedError):
            if not was_there:
                with suppress(OSError):
                    (folder / LOCK).unlink()
            break
    return None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, and puts it in `path`'s place when the body succeeds: write, fsync, rename, fsync.

    A crash, a full disk or an exception leaves the old file as it was. The path to write to keeps the suffix. The file
    gets the mode that any new file gets, whatever wrote it: safetensors makes files that only their owner can read.

    Raises:
        OSError: as the system told it; with ENOSPC where a library has told of a full disk in words of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write names no file
            raise OSError(error.errno, os.strerror(error.errno), str(temporary)) from error
        raise
    except Exception as error:
        if FULL.search(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary)) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a name outlast a power cut; systems that cannot open or sync a folder do without."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def kind_of(device: str) -> str:
    """What `memory.json`'s device is: "cpu", where memory is the process's, or "cuda", where it is the allocator's."""
    return "cpu" if device in ("cpu", "mps") else "cuda"


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Writes a whole file or nothing.

    Args:
        path: the file; its folder is made when missing.
        content: text (written as UTF-8) or bytes.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
