"""What a command line of `mep compare` asks for, without torch: options, methods, and its cells' own command lines."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mep_lightning.commands.options import Options
from mep_lightning.commands.recipes import find_recipe, mentions, nearest, recipe_names, recipes_folder
from mep_lightning.commands.request import FitRequest
from mep_lightning.comparison.cells import NO_PLAN, Cell
from mep_lightning.errors import SEEDS, UserError, refuse_unless
from mep_lightning.reading import load_yaml

if TYPE_CHECKING:
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

ROOT holds a folder of photos a subject. What each shows is its folder's name ("dog2" is a dog), unless a file
prompts_and_classes.txt in ROOT, as DreamBooth's set has it, says otherwise in lines such as "rex,dog"; the
dataset.json of CustomConcept101 is read as well.

in --out: table.md, table.csv, table.json and report.html, of all cells that the folder has; every cell's run below
runs/, what it printed below logs/, its record in cells.jsonl; in plans.json what `mep plan` said of each method, and in
settings.json what each was trained with

Exit status 1 says that a cell failed; memory is looked at before each, and --fit "--no-plan" tries one all the same.

examples:
  mep compare --methods zoodip,textual_inversion,lora --subjects 3 --seeds 2 --out compared
  mep compare --methods zoodip,qlora --data dreambooth/dataset --base ID_OR_DIR --only dog,cat2 --out dogs
  mep compare --methods textual_inversion --subjects 30 --subjects-per-batch 8 --out thirty
  mep compare --methods zoodip_fast --data SUBJECTS/ --base DIR --out /shared/many --engine ray --address auto
  mep compare --methods lora --fit "--model.precision bf16 --data.resolution 256" --data SUBJECTS/ --base DIR --out few
"""
NOT_METHODS = ("quickstart",)
INSTEAD = {
    "model.seed": "say with --seeds how many there are",
    "model.base": "give it with --base",
    "data.path": "give --data the folder that holds a folder of photos a subject",
    "data.class_word": "write it into prompts_and_classes.txt beside the subjects' folders",
    "run": "--out says where all of them are",
    "resume": "the same command again goes on with what is half trained",
}
"""What makes a cell a cell, which --fit may not set -> the mend."""
RETRIES = 3
"""How often a cell is begun again whose Ray worker or node was lost, unless said otherwise."""


def options_of_compare() -> Options:
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
    parser.add_argument(
        "--threads",
        type=int,
        metavar="T",
        help="of each process (default: torch's own, or a share of the cores; of Ray: 1)",
    )
    parser.add_argument(
        "--subjects-per-batch", type=int, default=1, metavar="K", help="that train together, where they can (default 1)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="MINUTES", help="that a cell may take; a batch, as many for each of its cells"
    )
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    return parser


def check(options: Namespace) -> None:
    """Raises:
    UserError: a number out of range, or an option of another engine.
    """
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
    if options.engine != "ray":
        for name in ("address", "retries"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for Ray; add --engine ray, or leave it out.")


def methods_of(words: Sequence[str]) -> dict[str, Path]:
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


def words_of_fit(fit: str) -> list[str]:
    """The words that --fit adds to every `mep fit`.

    Raises:
        UserError: its quotes are not closed, or it sets what every cell has of its own.
    """
    try:
        words = shlex.split(fit)
    except ValueError as error:
        raise UserError(f"--fit {fit!r} cannot be read ({error}); close its quotes.") from None
    said = FitRequest([], words)
    whole = {section: _read(said.setting(section)) for section in ("model", "data")}
    for key, mend in INSTEAD.items():
        if said.says(key) or mentions(whole, key):
            raise UserError(f"--fit sets --{key}, which every cell has of its own: leave it out; {mend}.")
    return words


def _read(value: str | None) -> Any:
    """What a section is set to as a whole; of what is no YAML `mep fit` tells."""
    with suppress(ValueError, yaml.YAMLError):
        return load_yaml(value or "")
    return None


def shared(options: Namespace) -> dict[str, Any]:
    """What all cells of a comparison have in common."""
    from mep_lightning.commands.test import read_prompts

    return {
        "base": anywhere(options.base),
        "data": None if options.data is None else str(Path(options.data).expanduser().resolve()),
        "max_steps": options.max_steps,
        "fit": _without_no_plan(options.fit),
        "images_per_prompt": options.images_per_prompt,
        "prompts": read_prompts(Path(options.prompts).expanduser()) if options.prompts else None,
        "clip": None if options.clip is None else anywhere(options.clip),
        "dino": None if options.dino is None else anywhere(options.dino),
    }


def _without_no_plan(fit: str) -> str:
    """What --fit says of what is learned: whether memory is looked at first may change from one try to the next."""
    words = words_of_fit(fit)
    return shlex.join(word for word in words if word != NO_PLAN) if NO_PLAN in words else fit


def cell_of(
    folder: ComparisonFolder,
    options: Namespace,
    which: tuple[str, Path, Subject, int],
    styles: Container[str] = (),
) -> Cell:
    """A cell with the words of its `mep fit` and `mep test`.

    Args:
        folder: of the comparison.
        options: of the command line.
        which: method, its recipe, subject and seed.
        styles: the methods that learn a style, which has no class word.
    """
    method, recipe, subject, seed = which
    run = folder.run(method, subject.name, seed).resolve()
    fit = ["--config", recipe_anywhere(recipe), "--run", str(run), "--model.base", anywhere(options.base)]
    fit += ["--model.seed", str(seed), "--data.path", str(subject.photos.resolve())]
    fit += [] if method in styles else ["--data.class_word", subject.class_word]
    fit += ["--samples.count", "1", "--samples.every", "0"]
    fit += [] if options.max_steps is None else ["--trainer.max_steps", str(options.max_steps)]
    test = ["--run", str(run), "--images-per-prompt", str(options.images_per_prompt), "--seed", str(1000 * seed)]
    for name in ("prompts", "clip", "dino"):
        value = getattr(options, name)
        test += [] if value is None else [f"--{name}", anywhere(value)]
    return Cell(method, subject.name, seed, run, [*fit, *words_of_fit(options.fit)], test)


def anywhere(name: str) -> str:
    """A file or folder by its whole path, which a process that began elsewhere finds too; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "tiny" and path.exists() else name


def recipe_anywhere(recipe: Path) -> str:
    """A packaged recipe by its name, as the package may lie elsewhere on another machine; others by their path."""
    packaged = recipes_folder()
    inside = packaged in recipe.parents
    return recipe.relative_to(packaged).with_suffix("").as_posix() if inside else str(recipe.resolve())
