"""Cells in processes of this machine: one that dies, hangs or runs out of memory loses its own batch alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mep_lightning.comparison.cells import Batch, Cell, Interrupted, halves, run
from mep_lightning.comparison.engines import Ended

PATIENCE = 60.0
"""Seconds that a process has to save what it trained once it is told to stop."""
TOLD_TO_STOP = 75
"""The status of a process that was told to stop, and did: EX_TEMPFAIL, which is what it is."""
TOLD = (TOLD_TO_STOP, -signal.SIGTERM)
"""And that of one that was so before it could hear."""
ATTENTION = 1.0
"""Seconds after which who waits looks up: an interrupt that is no signal, as Ray's, wakes nobody."""


class Worker:
    """A process that runs one batch of cells after the other.

    Args:
        logs: the folder for what cells print, a file each.
        threads: of torch in it; None leaves them.
        gpu: the only one that it sees, as CUDA_VISIBLE_DEVICES names it; None leaves it all that there are.

    Attributes:
        left: cells of its batch of which nothing is heard yet.
        missed: whether its process, which had done others, was gone before it could be given this batch.
    """

    def __init__(self, logs: Path, threads: int | None, gpu: str | None = None) -> None:
        context = get_context("spawn")
        self.logs, self.gpu = logs, gpu
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, logs, threads, gpu), daemon=False)
        self.process.start()
        theirs.close()
        self.left: list[Cell] = []
        self.began, self.size = 0.0, 0
        self.missed = False

    def give(self, batch: Batch) -> None:
        """Run this one next; where the process is gone, its end tells so."""
        is_first = self.size == 0
        self.left, self.began, self.size = list(batch), time.monotonic(), len(batch)
        try:
            self.connection.send(batch)
        except OSError:
            self.missed = not is_first  # a process that dies before its first batch may well do so each time

    def heard(self) -> list[tuple[Cell, dict[str, Any]]]:
        """Cells that came to an end since it was last asked, with their records."""
        found = []
        with suppress(EOFError, OSError):
            while self.left and self.connection.poll():
                key, record = self.connection.recv()
                (cell,) = (cell for cell in self.left if cell.key == key)
                self.left.remove(cell)
                found.append((cell, record))
        return found

    def time_left(self, timeout: float) -> float:
        """Seconds until its batch has taken too long, where a cell may take so many."""
        return self.began + self.size * timeout - time.monotonic()

    def dismiss(self) -> None:
        """End the process, which has nothing to do."""
        self.connection.close()
        self.process.join(PATIENCE)
        self.stop()

    def stop(self, patience: float = PATIENCE) -> None:
        """End the process; what it trains is saved first, where it comes to that."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


@dataclass(frozen=True)
class LocalEngine:
    """Cells in processes of this machine.

    Args:
        workers: processes at once.
        timeout: seconds that a cell may take; a batch may take as many for each of its cells.
        threads: of torch in each process; None leaves them.
        gpus: as CUDA_VISIBLE_DEVICES names them, for the processes to have one each, in turn where there are fewer;
            none leaves every process all that there are.
    """

    workers: int = 1
    timeout: float | None = None
    threads: int | None = None
    gpus: Sequence[str] = ()

    def run_all(self, batches: Sequence[Batch], logs: Path) -> Ended:
        """As `Engine.run_all`."""
        logs.mkdir(parents=True, exist_ok=True)
        waiting = deque(batches)
        busy: list[Worker] = []
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    busy.append(Worker(logs, self.threads, self._free(busy)))
                    busy[-1].give(waiting.popleft())
                self._wait(busy)
                for worker in list(busy):
                    lives = worker.process.is_alive()  # before it is listened to: its last words count
                    yield from worker.heard()
                    if not lives and worker.missed:
                        waiting.appendleft(worker.left)
                        worker.left = []
                    elif not lives and len(worker.left) > 1 and worker.process.exitcode not in TOLD:
                        waiting.extendleft(reversed(halves(worker.left)))
                        worker.left = []
                    elif worker.left and (end := self._end(worker, lives)) is not None:
                        yield from ((cell, end) for cell in worker.left)
                        worker.left = []
                    if worker.left:
                        continue
                    if waiting and worker.process.is_alive():
                        worker.give(waiting.popleft())
                    else:
                        busy.remove(worker)
                        worker.dismiss()
        finally:
            for worker in busy:
                if worker.process.is_alive():
                    worker.process.terminate()  # all at once
            for worker in busy:
                worker.stop()

    def _free(self, busy: Sequence[Worker]) -> str | None:
        """The GPU that fewest of these processes have."""
        taken = Counter(worker.gpu for worker in busy)
        return min(self.gpus, key=lambda gpu: taken[gpu], default=None)

    def _wait(self, busy: Sequence[Worker]) -> None:
        """Until something may have come of a batch."""
        patience = ATTENTION
        if self.timeout is not None:
            patience = min(patience, max(0.0, min(worker.time_left(self.timeout) for worker in busy)))
        wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy], patience)

    def _end(self, worker: Worker, lives: bool) -> dict[str, Any] | None:
        """What is recorded of cells whose process is dead, or is ended as it took too long; None of others."""
        if not lives:
            return _death(worker.process.exitcode, _log(worker.logs, worker.left[0]))
        if self.timeout is None or worker.time_left(self.timeout) > 0:
            return None
        worker.stop(patience=5.0)
        together = f", {worker.size} cells together" if worker.size > 1 else ""
        return {"error": f"not done after {worker.size * self.timeout / 60:g} minutes{together}", "kind": "time"}


def _death(status: int | None, log: Path) -> dict[str, Any]:
    if status in TOLD:
        return {"error": "its process was told to stop; what it saved is gone on with", "kind": "stopped"}
    if status == -signal.SIGKILL:
        return {"error": "killed, as systems do that run out of memory", "kind": "memory"}
    return {"error": f"its process died with status {status}; {log} may say why", "kind": "failed"}


def _work(connection: Connection, logs: Path, threads: int | None, gpu: str | None) -> None:
    """What a process does: batches as they come, until there are none."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is told as well, and says when to stop
    signal.signal(signal.SIGTERM, _interrupt)
    end_with_parent()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        while (batch := _next(connection)) is not None:
            for cell, record in run(batch, partial(_log_to, logs)):
                connection.send((cell.key, record))
    except (Interrupted, KeyboardInterrupt):
        sys.exit(TOLD_TO_STOP)


def _next(connection: Connection) -> Batch | None:
    """What is to be run, as soon as it is told; None where nobody tells any more."""
    with suppress(EOFError, OSError):
        return connection.recv()
    return None


def _interrupt(number: int, frame: object) -> None:
    """Stop, as Ctrl-C does; once is enough."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _log(logs: Path, cell: Cell) -> Path:
    return logs / f"{cell.method}-{cell.subject}-{cell.seed}.txt"


def _log_to(logs: Path, cell: Cell) -> None:
    """From here on what is printed goes to a cell's own file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(_log(logs, cell), "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def end_with_parent() -> None:
    """From here on this process is killed once the one that started it is gone.

    Nobody would hear of what it trains, and the next try may begin at once in the same folder: what is saved is saved.
    A Trainer answers SIGTERM itself, so that a process group's end does not reach it.
    """
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
