"""`mep compare`: trains and scores methods on subjects from seeds, and puts all of it into one table and page."""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mep_lightning.commands.compare_request import (
    RETRIES,
    anywhere,
    cell_of,
    check,
    methods_of,
    options_of_compare,
    recipe_anywhere,
    shared,
    words_of_fit,
)
from mep_lightning.errors import Terminated, UserError, counted, reason

if TYPE_CHECKING:
    from mep_lightning.comparison.cells import Batch, Cell
    from mep_lightning.comparison.engines import Engine
    from mep_lightning.comparison.folder import ComparisonFolder
    from mep_lightning.comparison.preflight import Method
    from mep_lightning.comparison.subjects import Subject

SELDOM = 20
"""How many times as long as the last table took the next one waits."""
NAMED = 12
"""Subjects whose class words are told before the first cell."""


def run(argv: Sequence[str]) -> int:
    """Runs `mep compare`; status 1 says that a cell failed, or was told to stop."""
    options = options_of_compare().parse_args(list(argv))
    methods = methods_of(options.methods)
    check(options)
    if options.engine == "ray":
        from mep_lightning.comparison.engines.ray import require

        require()
    from mep_lightning.bases import identify
    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.comparison.cells import batches
    from mep_lightning.comparison.folder import ComparisonFolder
    from mep_lightning.comparison.report import compared, write_all, write_table
    from mep_lightning.comparison.subjects import photograph

    quiet_after_imports()
    if options.data is None and identify(options.base).family != "tiny":
        raise UserError(
            "--data is missing; give a folder with a folder a subject (only the base tiny brings subjects)."
        )
    folder, common = ComparisonFolder(Path(options.out).expanduser()), shared(options)
    subjects = _subjects(options, folder)
    identify(options.base)  # what is no base is told once, not by every method
    which = _all(methods, subjects, options)
    read = _look(folder, options, which, len(methods), common["prompts"])
    styles = {method for method, settings in read.items() if settings is not None and settings.is_style}
    cells = [cell_of(folder, options, one, styles) for one in which]
    all_of_it = partial(compared, folder, list(methods), options.base)
    with folder.alone(), _saving_on_sigterm():
        folder.claim(common)
        told = {method: settings.settings for method, settings in read.items() if settings is not None}
        folder.settle(told, {one.name: one.class_word for one in subjects})
        if options.data is None:
            photograph(subjects)
        waits = set(_left(folder, options, which))
        todo, is_done = [cell for cell in cells if cell.key in waits], False
        _say_what(folder, options, methods, subjects, len(cells), len(todo))
        try:
            engine = _engine(options, methods, read)
            together = batches(todo, _sizes(todo, options.subjects_per_batch))
            _run_all(together, folder, engine, lambda: write_table(folder, all_of_it(rehearse=False)))
            is_done = True
        finally:  # whoever stops it does not wait for rehearsals
            written = write_all(folder, all_of_it(rehearse=is_done), subjects)
        print(written, flush=True)
        records = folder.records()
    return int(not all(cell.key in records and "error" not in records[cell.key] for cell in cells))


def _subjects(options: Namespace, folder: ComparisonFolder) -> list[Subject]:
    """Who is compared on."""
    from mep_lightning.comparison.subjects import chosen, embedded, found_in

    if options.data is None:
        if options.only is not None:
            raise UserError(
                "--only chooses from --data ROOT; for the tiny world's subjects say how many, --subjects N."
            )
        return embedded(options.subjects or 3, folder.photos)
    subjects = found_in(Path(options.data).expanduser())
    if options.only is not None:
        subjects = chosen(subjects, [name for name in options.only.split(",") if name])
    if options.subjects is not None and options.subjects > len(subjects):
        raise UserError(f"--subjects {options.subjects}: there are {len(subjects)}; give fewer, or leave it out.")
    return subjects[: options.subjects]


def _all(
    methods: Mapping[str, Path], subjects: Sequence[Subject], options: Namespace
) -> list[tuple[str, Path, Subject, int]]:
    """Every cell, a whole round of methods on a subject after the other: a table of all methods is there early."""
    return [
        (method, recipe, subject, seed)
        for seed in range(options.seeds)
        for subject in subjects
        for method, recipe in methods.items()
    ]


def _left(
    folder: ComparisonFolder, options: Namespace, which: Sequence[tuple[str, Path, Subject, int]]
) -> list[tuple[str, str, int]]:
    """Method, subject and seed of what is to be run."""
    done = folder.records()
    keys = [(method, subject.name, seed) for method, _, subject, seed in which]
    return [key for key in keys if key not in done or (options.retry and "error" in done[key])]


def _look(
    folder: ComparisonFolder,
    options: Namespace,
    which: Sequence[tuple[str, Path, Subject, int]],
    methods: int,
    prompts: Sequence[str] | None,
) -> dict[str, Method | None]:
    """What each method's cells are trained with, as the first cell of each has it.

    Raises:
        UserError: a mistake in its settings, in a prompt, or in what scores.
    """
    from mep_lightning.comparison.preflight import read_method, refuse_encoders

    runs_here = {method for method, *_ in _left(folder, options, which)} if options.engine == "local" else set()
    found = {}
    for one in which[:methods]:  # a round of them
        method, _, subject, _ = one
        found[method] = read_method(cell_of(folder, options, one), subject.class_word, prompts, method in runs_here)
    if runs_here:
        refuse_encoders(options.clip, options.dino, options.base)
    return found


def _say_what(
    folder: ComparisonFolder,
    options: Namespace,
    methods: Mapping[str, Path],
    subjects: Sequence[Subject],
    cells: int,
    left: int,
) -> None:
    """What is compared, and how much of it is done."""
    if options.data is not None:
        shown = ", ".join(f"{one.name} ({one.class_word})" for one in subjects[:NAMED])
        print(f"Subjects: {shown}{', …' if len(subjects) > NAMED else ''}.")
    print(
        f"{counted(len(methods), 'method')} on {counted(len(subjects), 'subject')} "
        f"from {counted(options.seeds, 'seed')}: "
        f"{counted(cells, 'cell')}, {cells - left} of them done. Everything goes to {folder.root}.",
        flush=True,
    )


def _sizes(cells: Sequence[Cell], most: int) -> dict[str, int]:
    """How many cells of each method train together; says which methods' cells train alone, and why."""
    if most == 1 or not cells:
        return {}
    from mep_lightning.commands.together import why_alone

    lines: dict[str, Sequence[str]] = {}
    for cell in cells:
        lines.setdefault(cell.method, cell.fit)
    alone = {method: why for method, line in lines.items() if (why := why_alone(line)) is not None}
    if alone:
        print(f"One at a time: {', '.join(f'{method} ({why})' for method, why in alone.items())}.", flush=True)
    return {method: most for method in lines if method not in alone}


def _engine(options: Namespace, methods: Mapping[str, Path], read: Mapping[str, Method | None]) -> Engine:
    """What runs the cells."""
    seconds = None if options.timeout is None else 60 * options.timeout
    if options.engine == "local":
        from mep_lightning.comparison.engines.local import LocalEngine
        from mep_lightning.comparison.preflight import gpus_of

        workers = options.workers or 1
        threads = options.threads or (None if workers == 1 else max(1, _cores() // workers))
        return LocalEngine(workers, seconds, threads, gpus_of(read, workers))
    from tqdm import tqdm

    from mep_lightning.comparison.engines.ray import RayEngine
    from mep_lightning.comparison.share import peak_of_cells

    named = [getattr(options, name) for name in ("base", "data", "prompts", "clip", "dino")]
    words = [*map(anywhere, filter(None, named)), *map(recipe_anywhere, methods.values())]
    fit = words_of_fit(options.fit)
    return RayEngine(
        address=options.address,
        workers=options.workers,
        timeout=seconds,
        threads=options.threads or 1,
        retries=RETRIES if options.retries is None else options.retries,
        reads=[path for path in map(Path, words) if path.is_absolute()],
        peak=lambda method, together: peak_of_cells(methods[method], options.base, fit, together),
        tell=lambda line: tqdm.write(line, file=sys.stdout),
    )


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_all(batches: Sequence[Batch], folder: ComparisonFolder, engine: Engine, refresh: Callable[[], None]) -> None:
    """Run cells and keep their records; `refresh` is called as they come, a twentieth of the time at most."""
    from tqdm import tqdm

    again, due = "Carry on with the same command.", 0.0
    with tqdm(total=sum(map(len, batches)), desc="Cells", unit="cell", disable=None) as bar:
        try:
            with closing(engine.run_all(batches, folder.logs)) as ended:
                for cell, record in ended:
                    if record.get("kind") != "stopped":
                        folder.keep({"method": cell.method, "subject": cell.subject, "seed": cell.seed, **record})
                        if time.monotonic() >= due:
                            began = time.monotonic()
                            try:
                                refresh()
                            except Exception as error:  # it is written anew at the end, and cells matter more
                                bar.write(f"The table could not be written yet ({reason(error)}).", file=sys.stderr)
                            due = time.monotonic() + SELDOM * (time.monotonic() - began)
                    bar.update()
                    bar.write(f"{cell.name}: {_told(record)}", file=sys.stdout)
        except KeyboardInterrupt:
            bar.write(f"Stopped; cells that are done are kept, and what the others trained. {again}", file=sys.stderr)
            raise


def _told(record: dict[str, Any]) -> str:
    """What came of a cell."""
    told = [f"{key} {record[key]:.3f}" for key in ("clip_t", "clip_i", "dino") if record.get(key) is not None]
    told += [f"{together} together"] if (together := record.get("batch") or 1) > 1 else []
    return str(record["error"]) if "error" in record else ", ".join(told)


@contextmanager
def _saving_on_sigterm() -> Iterator[None]:
    """SIGTERM, as a cluster's time limit sends it, is answered as Ctrl-C is."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: cells are being saved
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
