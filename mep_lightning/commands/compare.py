"""`mep compare`: trains and scores methods on subjects from seeds, and puts all of it into one table and page."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mep_lightning.commands.options import Options
from mep_lightning.commands.recipes import find_recipe, nearest, recipe_names, recipes_folder
from mep_lightning.errors import SEEDS, UserError, counted, refuse_unless

if TYPE_CHECKING:
    from mep_lightning.comparison.cells import Batch, Cell
    from mep_lightning.comparison.engines import Engine
    from mep_lightning.comparison.folder import ComparisonFolder
    from mep_lightning.comparison.subjects import Subject

EPILOG = """\
A cell is one method on one subject from one seed: `mep fit`, then `mep test`. What is done stays done: the same command
again runs the cells that are missing, and with more methods, subjects or seeds those beside them. A cell that fails, or
runs out of memory or time, is a line in the table, and the others go on; --retry runs it again.

--subjects-per-batch K trains up to K subjects of a method and seed in one batch, where the method trains a token by a
gradient (zoodip, zoodip_fast, textual_inversion): one forward pass over the base serves them all, and each learns what
it would learn alone, up to rounding. Every one is drawn, scored and recorded as a cell of its own. A batch that fails,
or for which memory runs out, is tried again in halves. K may change from one run of the command to the next.

--engine ray runs the cells as tasks of a Ray cluster: one of this machine, or the one at --address, whose nodes must
all see --out, the photos and the base under the same paths. A cell, or a batch, asks for T CPUs and, where there are
GPUs, for the part of one that `mep plan` says it takes; one whose worker or node is lost goes on elsewhere. Either
engine carries on with what the other began.

in --out: table.md, table.csv, table.json, report.html, every cell's run below runs/, its record in cells.jsonl, and in
plans.json what `mep plan` said of each method

examples:
  mep compare --methods zoodip,textual_inversion,lora --subjects 3 --seeds 2 --out compared
  mep compare --methods zoodip,qlora --data dreambooth/dataset --base ID_OR_DIR --only dog,cat2 --out dogs
  mep compare --methods textual_inversion --subjects 30 --subjects-per-batch 8 --out thirty
  mep compare --methods zoodip_fast --data SUBJECTS/ --base DIR --out /shared/many --engine ray --address auto
  mep compare --methods lora --fit "--model.precision bf16 --data.resolution 256" --data photos/ --base DIR --out small
"""
NOT_METHODS = ("quickstart",)
RETRIES = 3
"""How often a cell is begun again whose Ray worker or node was lost, unless said otherwise."""


def run(argv: Sequence[str]) -> int:
    """Runs `mep compare`."""
    options = _options().parse_args(list(argv))
    methods = _methods(options.methods)
    _check(options)
    _check_engine(options)
    from mep_lightning.bases import identify
    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.comparison.cells import batches
    from mep_lightning.comparison.folder import ComparisonFolder

    quiet_after_imports()
    folder = ComparisonFolder(Path(options.out).expanduser())
    if options.data is None and identify(options.base).family != "tiny":
        raise UserError(
            "--data is missing; give a folder with a folder a subject (only the base tiny brings subjects)."
        )
    common = _shared(options)

    def claim() -> None:
        identify(options.base)  # what is no base is told once, not by every cell
        folder.claim(common)

    subjects = _subjects(options, folder, claim)
    cells = [_cell(folder, options, *which) for which in _all(methods, subjects, options)]
    done = folder.records()
    todo = [cell for cell in cells if cell.key not in done or (options.retry and "error" in done[cell.key])]
    print(
        f"{counted(len(methods), 'method')} on {counted(len(subjects), 'subject')} "
        f"from {counted(options.seeds, 'seed')}: "
        f"{counted(len(cells), 'cell')}, {len(cells) - len(todo)} of them done. Everything goes to {folder.root}.",
        flush=True,
    )
    try:
        _run_all(batches(todo, _sizes(todo, options.subjects_per_batch)), folder, _engine(options, methods))
    finally:
        written = _write(folder, methods, subjects, options)
    print(written, flush=True)
    return 0


def shared(argv: Sequence[str]) -> dict[str, Any]:
    """What all cells of a command line's comparison have in common."""
    return _shared(_options().parse_args(list(argv)))


def _options() -> Options:
    parser = Options("compare", "Trains and scores methods on the same subjects, and compares them.", EPILOG)
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="NAME", help="recipes, or YAML files; a,b or a b"
    )
    parser.add_argument("--data", metavar="ROOT", help="a folder with a folder of photos a subject")
    parser.add_argument("--subjects", type=int, metavar="N", help="how many: the first N (default: all of ROOT, or 3)")
    parser.add_argument("--only", metavar="A,B", help="which of ROOT's subjects")
    parser.add_argument("--seeds", type=int, default=1, metavar="S", help="how many seeds (default 1)")
    parser.add_argument("--base", default="tiny", metavar="ID_OR_DIR", help="default: tiny")
    parser.add_argument("--max-steps", type=int, metavar="K", help="steps of every method (default: each one's own)")
    parser.add_argument("--fit", default="", metavar="WORDS", help="more settings for every `mep fit`, in one string")
    parser.add_argument("--images-per-prompt", type=int, default=4, metavar="K", help="default 4")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one a line, {} where the subject goes (default: those of the base)"
    )
    parser.add_argument("--clip", metavar="ID_OR_DIR", help="CLIP checkpoint of the scores, as for `mep test`")
    parser.add_argument("--dino", metavar="ID_OR_DIR", help="DINO checkpoint of the scores, as for `mep test`")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where cells run (default: local processes)",
    )
    parser.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, or auto (default: one of this machine)")
    parser.add_argument(
        "--retries", type=int, metavar="N", help=f"of a cell whose Ray worker or node was lost (default {RETRIES})"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="W",
        help="cells (or batches) at once, a process each (default 1; of Ray: all it has room for)",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="of each process (default: torch's own; of Ray: 1)")
    parser.add_argument(
        "--subjects-per-batch", type=int, default=1, metavar="K", help="that train together, where they can (default 1)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="MINUTES", help="that a cell may take; a batch, as many for each of its cells"
    )
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    return parser


def _check(options: Namespace) -> None:
    for name in ("seeds", "images_per_prompt", "subjects_per_batch"):
        value = getattr(options, name)
        refuse_unless(value >= 1, f"--{name.replace('_', '-')}", value, "1 or more")
    for name in ("max_steps", "subjects", "workers", "threads"):
        value = getattr(options, name)
        refuse_unless(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "1 or more")
    refuse_unless(options.seeds < SEEDS, "--seeds", options.seeds, "fewer")
    fine = options.timeout is None or options.timeout > 0
    refuse_unless(fine, "--timeout", options.timeout, "minutes above 0")
    refuse_unless(options.retries is None or options.retries >= 0, "--retries", options.retries, "0 or more")


def _check_engine(options: Namespace) -> None:
    """Before anything is written: whether Ray is there, and what is said to it meant for it."""
    if options.engine == "ray":
        from mep_lightning.comparison.engines.ray import require

        require()
        return
    for name in ("address", "retries"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for Ray; add --engine ray, or leave it out.")


def _methods(words: Sequence[str]) -> dict[str, Path]:
    """What the table calls each method -> its recipe.

    Raises:
        UserError: one is neither a recipe nor a file; the message lists the recipes.
    """
    known = [name for name in recipe_names() if "/" not in name and name not in NOT_METHODS]
    names = [name for word in words for name in word.split(",") if name]
    found: dict[str, Path] = {}
    for name in names:
        is_file = Path(name).expanduser().is_file()
        if not (is_file or name in known):
            guess = f"; did you mean {near}?" if (near := nearest(name, known)) else "."
            raise UserError(f"--methods {name}: there is no such method{guess} There are {', '.join(known)}.")
        label = Path(name).stem if is_file else name
        if label in found:
            raise UserError(f"--methods {name}: {label} is named twice; name it once.")
        found[label] = find_recipe(name)
    if not found:
        raise UserError(f"--methods names none; there are {', '.join(known)}.")
    return found


def _subjects(options: Namespace, folder: ComparisonFolder, claim: Callable[[], None]) -> list[Subject]:
    """Who is compared on; the folder is claimed once they are known, and before photos are written into it."""
    from mep_lightning.comparison.subjects import chosen, embedded, found_in

    if options.data is None:
        if options.only:
            raise UserError(
                "--only chooses from --data ROOT; for the tiny world's subjects say how many, --subjects N."
            )
        return embedded(options.subjects or 3, folder.photos, claim)
    subjects = found_in(Path(options.data).expanduser())
    if options.only:
        subjects = chosen(subjects, [name for name in options.only.split(",") if name])
    claim()
    return subjects[: options.subjects]


def _shared(options: Namespace) -> dict[str, Any]:
    """What all cells of a comparison have in common."""
    from mep_lightning.commands.test import read_prompts

    return {
        "base": options.base,
        "data": None if options.data is None else str(Path(options.data).expanduser().resolve()),
        "max_steps": options.max_steps,
        "fit": options.fit,
        "images_per_prompt": options.images_per_prompt,
        "prompts": read_prompts(Path(options.prompts).expanduser()) if options.prompts else None,
        "clip": options.clip,
        "dino": options.dino,
    }


def _all(
    methods: dict[str, Path], subjects: Sequence[Subject], options: Namespace
) -> list[tuple[str, Path, Subject, int]]:
    """Every cell, a whole round of methods on a subject after the other: a table of all methods is there early."""
    return [
        (method, recipe, subject, seed)
        for seed in range(options.seeds)
        for subject in subjects
        for method, recipe in methods.items()
    ]


def _cell(folder: ComparisonFolder, options: Namespace, method: str, recipe: Path, subject: Subject, seed: int) -> Cell:
    from mep_lightning.comparison.cells import Cell

    run = folder.run(method, subject.name, seed).resolve()
    fit = ["--config", _recipe_anywhere(recipe), "--run", str(run), "--model.base", _anywhere(options.base)]
    fit += ["--model.seed", str(seed), "--data.path", str(subject.photos.resolve())]
    fit += ["--data.class_word", subject.class_word, "--samples.count", "1", "--samples.every", "0"]
    fit += [] if options.max_steps is None else ["--trainer.max_steps", str(options.max_steps)]
    test = ["--run", str(run), "--images-per-prompt", str(options.images_per_prompt), "--seed", str(1000 * seed)]
    for name in ("prompts", "clip", "dino"):
        value = getattr(options, name)
        test += [] if value is None else [f"--{name}", _anywhere(value)]
    return Cell(method, subject.name, seed, run, [*fit, *shlex.split(options.fit)], test)


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


def _anywhere(name: str) -> str:
    """A file or folder by its whole path, which a process that began elsewhere finds too; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "tiny" and path.exists() else name


def _recipe_anywhere(recipe: Path) -> str:
    """A packaged recipe by its name, as the package may lie elsewhere on another machine; others by their path."""
    packaged = recipes_folder()
    inside = packaged in recipe.parents
    return recipe.relative_to(packaged).with_suffix("").as_posix() if inside else str(recipe.resolve())


def _engine(options: Namespace, methods: dict[str, Path]) -> Engine:
    """What runs the cells."""
    seconds = None if options.timeout is None else 60 * options.timeout
    if options.engine == "local":
        from mep_lightning.comparison.engines.local import LocalEngine

        return LocalEngine(options.workers or 1, seconds, options.threads)
    from tqdm import tqdm

    from mep_lightning.comparison.engines.ray import RayEngine
    from mep_lightning.comparison.share import peak_of_cells

    named = [getattr(options, name) for name in ("base", "data", "prompts", "clip", "dino")]
    words = [*map(_anywhere, filter(None, named)), *map(_recipe_anywhere, methods.values())]
    return RayEngine(
        address=options.address,
        workers=options.workers,
        timeout=seconds,
        threads=options.threads or 1,
        retries=RETRIES if options.retries is None else options.retries,
        reads=[path for path in map(Path, words) if path.is_absolute()],
        peak=lambda method, together: peak_of_cells(methods[method], options.base, shlex.split(options.fit), together),
        tell=lambda line: tqdm.write(line, file=sys.stdout),
    )


def _run_all(batches: Sequence[Batch], folder: ComparisonFolder, engine: Engine) -> None:
    from tqdm import tqdm

    again = "Carry on with the same command."
    with tqdm(total=sum(map(len, batches)), desc="Cells", unit="cell", disable=None) as bar:
        try:
            with closing(engine.run_all(batches, folder.logs)) as ended:
                for cell, record in ended:
                    folder.keep({"method": cell.method, "subject": cell.subject, "seed": cell.seed, **record})
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


def _write(folder: ComparisonFolder, methods: dict[str, Path], subjects: Sequence[Subject], options: Namespace) -> str:
    """The table in three forms, and the page; which of them there are, in a sentence."""
    from mep_lightning.comparison.report import write_all

    return write_all(folder, list(methods), subjects, options.base)
