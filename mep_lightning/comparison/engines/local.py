"""Cells in processes of this machine: one that dies, hangs or runs out of memory loses that cell alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mep_lightning.comparison.cells import Cell, Interrupted, run
from mep_lightning.comparison.engines import Ended

PATIENCE = 60.0
"""Seconds that a process has to save what it trained once it is told to stop."""
ATTENTION = 1.0
"""Seconds after which who waits looks up: an interrupt that is no signal, as Ray's, wakes nobody."""


class Worker:
    """A process that runs one cell after the other.

    Args:
        logs: the folder for what cells print, a file each.
        threads: of torch in it; None leaves them.
    """

    def __init__(self, logs: Path, threads: int | None) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, logs, threads), daemon=False)
        self.process.start()
        theirs.close()
        self.cell: Cell | None = None
        self.began = 0.0

    def give(self, cell: Cell) -> None:
        """Run this one next."""
        self.cell, self.began = cell, time.monotonic()
        self.connection.send(cell)

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
        timeout: seconds that a cell may take.
        threads: of torch in each process; None leaves them.
    """

    workers: int = 1
    timeout: float | None = None
    threads: int | None = None

    def run_all(self, cells: Sequence[Cell], logs: Path) -> Ended:
        """As `Engine.run_all`."""
        logs.mkdir(parents=True, exist_ok=True)
        waiting = deque(cells)
        busy: list[Worker] = []
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    busy.append(Worker(logs, self.threads))
                    busy[-1].give(waiting.popleft())
                for worker, record in _ended(busy, self.timeout):
                    cell = worker.cell
                    assert cell is not None
                    if waiting and worker.process.is_alive():
                        worker.give(waiting.popleft())
                    else:
                        busy.remove(worker)
                        worker.dismiss()
                    yield cell, record
        finally:
            for worker in busy:
                if worker.process.is_alive():
                    worker.process.terminate()  # all at once
            for worker in busy:
                worker.stop()


def _ended(busy: Sequence[Worker], timeout: float | None) -> list[tuple[Worker, dict[str, Any]]]:
    """The workers whose cell came to an end, each with its record."""
    patience = ATTENTION
    if timeout is not None:
        left = min(worker.began for worker in busy) + timeout - time.monotonic()
        patience = min(patience, max(0.0, left))
    ready = wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy], patience)
    ended = []
    for worker in busy:
        record = _heard(worker.connection) if worker.connection in ready else None
        if record is None and worker.process.sentinel in ready:
            worker.process.join()
            record = _heard(worker.connection) or _death(worker.process.exitcode)
        if record is None and timeout is not None and time.monotonic() - worker.began >= timeout:
            worker.stop(patience=5.0)
            record = {"error": f"not done after {timeout / 60:g} minutes", "kind": "time"}
        if record is not None:
            ended.append((worker, record))
    return ended


def _heard(connection: Connection) -> dict[str, Any] | None:
    with suppress(EOFError, OSError):
        if connection.poll():
            return connection.recv()
    return None


def _death(status: int | None) -> dict[str, Any]:
    if status == -signal.SIGKILL:
        return {"error": "killed, as systems do that run out of memory", "kind": "memory"}
    return {"error": f"its process died with status {status}", "kind": "failed"}


def _work(connection: Connection, logs: Path, threads: int | None) -> None:
    """What a process does: cells as they come, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is told as well, and says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with suppress(EOFError, OSError, Interrupted):
        while True:
            cell: Cell = connection.recv()
            with open(logs / f"{cell.method}-{cell.subject}-{cell.seed}.txt", "a", encoding="utf-8") as log:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                connection.send(run(cell))


def _end_with_parent() -> None:
    """Nobody would hear of the cell, and the next try may begin at once in the same folder: what is saved is saved."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
