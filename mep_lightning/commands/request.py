"""What a command line of `mep fit` asks for, without torch, and a word to whoever asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mep_lightning.commands.recipes import find_recipe, mentions, read_recipe, recipe_names, recipes_folder
from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder

RUNS = "runs"
"""The folder of runs that were given no name."""


@dataclass
class FitRequest:
    """What a command line of `mep fit` asks for.

    Attributes:
        recipes: the files named by `--config` in their order, with what they say.
        settings: the other arguments, which override the recipes.
        run: the folder named by `--run`, if any.
        resume: whether to carry on from its last checkpoint.
    """

    recipes: list[tuple[Path, dict[str, Any]]]
    settings: list[str]
    run: RunFolder | None = None
    resume: bool = False
    arguments: list[str] = field(init=False)

    def __post_init__(self) -> None:
        configs = [word for path, _ in self.recipes for word in ("--config", str(path))]
        self.arguments = [*configs, *self._seed(), *self.settings]

    def _seed(self) -> list[str]:
        """The model's seed where the user gives everything's alone: what is drawn in training comes from the model's.

        It stands before the command line, which may name another.
        """
        said = [recipe["seed_everything"] for _, recipe in self.recipes if "seed_everything" in recipe]
        seed = self.setting("seed_everything") or (said[-1] if said else "")
        is_own = any(mentions(recipe, "model.seed") for _, recipe in self._mine())
        return ["--model.seed", str(seed)] if str(seed).isdecimal() and not is_own else []

    def _mine(self) -> list[tuple[Path, dict[str, Any]]]:
        """The user's recipes, without the packaged ones."""
        return [(path, recipe) for path, recipe in self.recipes if recipes_folder() not in path.parents]

    def says(self, key: str) -> bool:
        """Whether a recipe or the command line sets a key."""
        said = any(word.partition("=")[0] == f"--{key}" for word in self.settings)
        return said or any(mentions(recipe, key) for _, recipe in self.recipes)

    def setting(self, key: str) -> str | None:
        """What the command line sets a key to; the last word counts."""
        found = None
        for word, after in pairwise([*self.settings, ""]):
            name, equals, value = word.partition("=")
            if name == f"--{key}":
                found = value if equals else after
        return found

    def own(self, key: str) -> Any:
        """As `value`, but leaving the packaged recipes out: what the user insists on."""
        return FitRequest(self._mine(), self.settings).value(key)

    def value(self, key: str) -> Any:
        """What the command line, or the last recipe that says it, sets a key of two parts to, such as model.base."""
        section, _, name = key.partition(".")
        said = [recipe[section][name] for _, recipe in self.recipes if name in (recipe.get(section) or {})]
        return self.setting(key) or (said[-1] if said else None)


def read_request(
    configs: Sequence[str], settings: list[str], run: str | None, resume: bool, *, chosen: bool = False
) -> FitRequest:
    """Reads the recipes and checks the run's folder; `chosen` says that a recipe will be chosen by its memory.

    Raises:
        UserError: no recipe, one that cannot be read, or a folder that is taken or cannot be resumed.
    """
    folder = RunFolder(Path(run).expanduser()) if run is not None else None
    paths = [find_recipe(name) for name in configs]
    if resume:
        if folder is None:
            raise UserError("--resume needs the run to carry on: add --run DIR.")
        if not folder.config.is_file():
            raise UserError(f"{folder.root} holds no config.yaml to resume from; give the folder of an earlier run.")
        paths = [folder.config, *paths]
    elif folder is not None and folder.root.exists() and not folder.root.is_dir():
        raise UserError(f"{folder.root} is a file; name another folder with --run.")
    elif folder is not None and is_first_process():
        refuse_taken(folder)
    if not paths and not chosen and not any(word.startswith("--print_config") for word in settings):
        raise UserError(f"say what to do with --config RECIPE: a YAML file or one of {', '.join(recipe_names())}.")
    return FitRequest([(path, read_recipe(path)) for path in paths], settings, folder, resume)


def refuse_taken(folder: RunFolder) -> None:
    """Raises:
    UserError: something is in the folder, so that no run can begin there.
    """
    if not folder.is_empty:
        mend = "add --resume to carry it on, or name another" if folder.config.is_file() else "name another"
        raise UserError(f"{folder.root} exists and is not empty; {mend} folder.")


def is_first_process() -> bool:
    """Whether this is the process that the user started, rather than one that a launcher made for another device."""
    if "RANK" in os.environ:  # torchrun's
        return os.environ["RANK"] == "0"
    if _by_slurm():
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def is_one_of_many() -> bool:
    """Whether a launcher started this process beside others, which cannot learn from it what it names."""
    by_torchrun = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return by_torchrun or _by_slurm() or os.environ.get("NODE_RANK", "0") != "0"


def _by_slurm() -> bool:
    """Whether this is a task of a SLURM job, and not a shell in one, as Lightning tells them apart."""
    tasks, job = os.environ.get("SLURM_NTASKS", "1"), os.environ.get("SLURM_JOB_NAME")
    return tasks != "1" and job not in ("bash", "interactive")


def say(*lines: str) -> None:
    """Prints for the user, at once, from the first process only."""
    if is_first_process():
        print(*lines, sep="\n", file=sys.stdout, flush=True)
