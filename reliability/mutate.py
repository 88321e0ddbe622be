"""`mutate`: damaged files are fed to what the commands read them with; each works or is told in one sentence.

A case is a pure function of (seed, kind, number). Workers are processes that are used again; one that hangs, dies or
takes more memory than it may is a finding, and another takes its place.
"""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rows import Row, row

SHARES = {"photos": 0.25, "captions": 0.13, "recipe": 0.22, "export": 0.2, "checkpoint": 0.1, "run folder": 0.1}
"""Kind -> its share of the cases."""
OUTCOMES = ("works", "told in a sentence", "another exception", "hangs", "dies", "writes outside its folder")
PATIENCE = 20.0
"""Seconds of a processor that a case may take; a machine with much else to do must not look like a hang."""
STILL = 120.0
"""Seconds that it may take whatever the processor does, as one that waits for what never comes."""
START = 300.0
"""Seconds that a worker may take until it is ready."""
MEMORY = 3 * 2**30
"""Bytes of address space that a worker may take beyond what it holds when it is ready."""
LONGEST = 700
"""Characters of a sentence."""
REFERENCE = (
    *("fit", "--config", "zoodip", "--model.base", "tiny", "--trainer.max_steps", "4", "--model.subspace.tau", "2"),
    *("--samples.count", "1", "--samples.steps", "1", "--samples.every", "2", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--no-plan"),
)
"""The run whose files are damaged."""


def run(
    cases: int = 2000,
    seed: int = 0,
    workers: int = 2,
    only: str | None = None,
    reference: Path | None = None,
    told: list[str] | None = None,
) -> list[Row]:
    """Feed so many damaged files.

    Args:
        cases: how many, over all kinds.
        seed: of the damages.
        workers: processes at once.
        only: one kind alone.
        reference: a finished run whose files are damaged; one is trained when None.
        told: takes what went wrong, case by case; it is printed too.
    """
    kinds = [only] if only else list(SHARES)
    shares = {kind: SHARES[kind] / sum(SHARES[one] for one in kinds) for kind in kinds}
    todo = [(kind, number) for kind in kinds for number in range(max(round(cases * shares[kind]), 1))]
    counts: Counter[tuple[str, str]] = Counter()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    wrong = [] if told is None else told
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if reference is None:
            reference = root / "reference" / "run"
            _train(reference)
        for (kind, number), outcome, what, took in _run_all(todo, root, reference, seed, workers):
            counts[kind, outcome] += 1
            seconds[kind].append(took)
            if outcome not in OUTCOMES[:2]:
                wrong.append(f"{kind} #{number} {outcome}: {what}")
                print(wrong[-1], flush=True)
    found = []
    for kind in kinds:
        found += [row("mutate", kind, outcome, counts[kind, outcome], "count") for outcome in OUTCOMES]
        found.append(row("mutate", kind, "longest case", max(seconds[kind]), "s"))
    return found


def _train(run: Path) -> None:
    process = get_context("spawn").Process(target=_fit, args=(str(run),))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run whose files are to be damaged ended with status {process.exitcode}")


def _fit(run: str) -> None:
    from mep_lightning.cli import main

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        sys.exit(main([*REFERENCE, "--run", run]))


# -- the workers -------------------------------------------------------------------------------------------------------


class Worker:
    """A process that is given one case after the other."""

    def __init__(self, root: Path, reference: Path, seed: int, number: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.stacks = root / f"worker-{number}.stacks"
        self.process = context.Process(target=_work, args=(theirs, str(root), str(reference), seed, number))
        self.process.start()
        theirs.close()
        self.case: tuple[str, int] | None = None
        self.began, self.clock = time.monotonic(), 0.0
        if not (self.connection.poll(START) and self.connection.recv() == "ready"):
            raise RuntimeError("a worker does not start")

    def give(self, case: tuple[str, int]) -> None:
        self.case, self.began, self.clock = case, time.monotonic(), self._clock()
        self.connection.send(case)

    def ended(self) -> tuple[str, str] | None:
        """Outcome of its case, if it is known."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return "dies", f"status {self.process.exitcode}"
        taken, waited = self._clock() - self.clock, time.monotonic() - self.began
        if taken > PATIENCE or waited > STILL:
            where = self._stack()
            self.stop()
            return "hangs", f"not done after {waited:.0f} s, {taken:.0f} s of a processor: {where}"
        return None

    def _stack(self) -> str:
        """Where the process is."""
        os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(1)
        lines = self.stacks.read_text().splitlines() if self.stacks.exists() else []
        return " < ".join(line.strip().removeprefix("File ") for line in lines if "File " in line)[:600]

    def _clock(self) -> float:
        """Seconds of a processor that the process has had; of one that has ended none are told."""
        with suppress(psutil.Error):
            times = psutil.Process(self.process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _run_all(todo: Sequence[tuple[str, int]], root: Path, reference: Path, seed: int, workers: int) -> Any:
    """Every case with outcome, detail and seconds, in the order in which they end."""
    waiting, busy = list(reversed(todo)), []
    names = iter(range(10**6))
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                busy.append(Worker(root, reference, seed, next(names)))
                busy[-1].give(waiting.pop())
            wait([worker.connection for worker in busy], timeout=0.5)
            for worker in list(busy):
                if (ended := worker.ended()) is None:
                    continue
                yield worker.case, *ended, time.monotonic() - worker.began
                if ended[0] in ("hangs", "dies"):
                    busy.remove(worker)
                elif waiting:
                    worker.give(waiting.pop())
                else:
                    busy.remove(worker)
                    worker.stop()
    finally:
        for worker in busy:
            worker.stop()


def _work(connection: Any, root: str, reference: str, seed: int, number: int) -> None:
    """What a process does."""
    import resource
    import warnings

    from mep_lightning.commands.chatter import quiet_after_imports, quiet_before_imports

    quiet_before_imports()
    stacks = open(Path(root, f"worker-{number}.stacks"), "w")  # noqa: SIM115 (as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    sys.dont_write_bytecode = True
    box = Path(root, f"worker-{number}")
    (box / "a" / "b").mkdir(parents=True)
    os.chdir(box / "a" / "b")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from reliability.feeding import Feeder

    quiet_after_imports()
    warnings.simplefilter("ignore")
    feeder = Feeder(Path(reference))
    (box / "temporary").mkdir()
    tempfile.tempdir = str(box / "temporary")  # where libraries may write
    written = _watch(box / "a" / "b" / "case", box / "temporary")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    connection.send("ready")
    while True:
        kind, case = connection.recv()
        folder = box / "a" / "b" / "case"
        folder.mkdir()
        written.clear()
        os.chdir(folder)
        outcome = _fed(feeder, kind, random.Random(f"mutate {seed} {kind} {case}"), folder)
        elsewhere = list(written)
        os.chdir(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        expected = {box / "a", box / "a" / "b", *(box / "temporary").rglob("*"), box / "temporary"}
        beside = [str(path) for path in box.rglob("*") if path not in expected]
        if elsewhere or beside:
            outcome = "writes outside its folder", ", ".join([outcome[1][:60], *elsewhere, *beside])[:300]
        for path in beside:
            shutil.rmtree(path, ignore_errors=True)
            Path(path).unlink(missing_ok=True)
        connection.send(outcome)


def _watch(*folders: Path) -> list[str]:
    """Files that Python code opens for writing, makes, renames or removes elsewhere than in folders, from now on."""
    written: list[str] = []
    inside = (*map(str, folders), "/dev/", "/proc/")

    def look(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.rmdir", "os.truncate", "os.system"):
            path = args[1] if event in ("os.rename", "os.symlink") else args[0]
            if args[-1] not in (path, -1) and event in ("os.remove", "os.rmdir", "os.mkdir"):
                return  # within a folder that is open, as when a tree is removed
        elif event in ("subprocess.Popen", "socket.connect"):
            path = f"{event} {args[0] if event == 'subprocess.Popen' else args[1]}"
        else:
            return
        if isinstance(path, (str, bytes)) and not os.path.abspath(os.fsdecode(path)).startswith(inside):
            written.append(f"{event} {os.fsdecode(path)}")

    sys.addaudithook(look)
    return written


def _fed(feeder: Any, kind: str, rng: random.Random, folder: Path) -> tuple[str, str]:
    from mep_lightning.cli import sentence_about

    what = ["?"]
    try:
        feeder.feed(kind, rng, folder, what)
    except Exception as error:
        told = sentence_about(error, "fit")
        where = f"{what[0]}: {type(error).__name__}: {str(error)[:300]}"
        if told is None:
            import traceback

            frames = traceback.extract_tb(error.__traceback__)
            places = [f"{Path(one.filename).name}:{one.lineno}" for one in frames][-6:]
            return "another exception", f"{where} at {' < '.join(reversed(places))}"
        sentence = " ".join(told[0].split())
        if not sentence or len(sentence) > LONGEST or "Traceback" in sentence:
            return "another exception", f"{where} (a sentence of {len(sentence)} characters)"
        return "told in a sentence", sentence
    except SystemExit as error:
        return ("works" if not error.code else "another exception"), f"{what[0]}: SystemExit {error.code}"
    return "works", what[0]
