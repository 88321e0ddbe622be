"""`mep fit`: reads the recipes and finds the run's folder, before torch is imported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mep_lightning.commands.options import Options
from mep_lightning.commands.recipes import find_recipe, mentions, read_recipe, recipe_names
from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder

RUNS = "runs"

EPILOG = """\
most used settings (each can also stand in a YAML file):
  --model.base ID_OR_DIR          a hub id, a folder in diffusers' layout, or tiny (default)
  --model.precision P             what its weights are kept in: fp32, bf16, fp16 or int8
  --model.lr LR                   learning rate
  --model.seed N                  of noise, timesteps and perturbations
  --model.estimator NAME          how a gradient comes about; its settings as --model.estimator.n 4
  --model.subspace.tau N          the trajectory that Subspace Gradient looks at; --model.subspace null: none
  --data.path DIR                 a folder of photos
  --data.class_word WORD          what they show, such as dog
  --trainer.max_steps N           how long to train
  --trainer.accelerator cpu|gpu   where
  --trainer.callbacks+=NAME       one more Lightning callback
  --samples.every N               steps between sample pictures
  --checkpoint.every N            steps between checkpoints

examples:
  mep fit --config quickstart
  mep fit --config models/sd15 --config zoodip --data.path photos/ --data.class_word dog
  mep fit --config zoodip --model.estimator SPSAEstimator --model.estimator.n 4
  mep fit --run runs/zoodip-1 --resume --trainer.max_steps 5000
"""


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
        self.arguments = [*configs, *self.settings]

    def says(self, key: str) -> bool:
        """Whether a recipe or the command line sets a key."""
        said = any(word.partition("=")[0] == f"--{key}" for word in self.settings)
        return said or any(mentions(recipe, key) for _, recipe in self.recipes)


def run(argv: Sequence[str]) -> int:
    """Runs `mep fit`."""
    parser = _options()
    options, settings = parser.parse_known_args(list(argv))
    if options.help_all or any(re.fullmatch(r"--[\w.]+\.help", word) for word in settings):
        from mep_lightning.commands.training import show_all_options

        return show_all_options(["--help"] if options.help_all else settings)
    request = read_request(options.config or [], settings, options.run, options.resume)

    from mep_lightning.commands.training import train

    return train(request)


def _options() -> Options:
    listed = "\n".join(f"  {name}" for name in recipe_names())
    parser = Options("fit", "Learns a subject from a folder of photos.", f"packaged recipes:\n{listed}\n\n{EPILOG}")
    parser.add_argument(
        "--config", "-c", action="append", metavar="RECIPE", help="a packaged recipe or a YAML file; may repeat"
    )
    parser.add_argument("--run", metavar="DIR", help=f"the run's folder (default: {RUNS}/<method>-N)")
    parser.add_argument("--resume", action="store_true", help="carry on where the run in --run DIR stopped")
    parser.add_argument("--help-all", action="store_true", help="every setting of the model, data and Trainer")
    return parser


def read_request(configs: Sequence[str], settings: list[str], run: str | None, resume: bool) -> FitRequest:
    """Reads the recipes and checks the run's folder.

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
    elif folder is not None and is_first_process() and not folder.is_empty:
        mend = (
            "add --resume to carry it on, or name another folder" if folder.config.is_file() else "name another folder"
        )
        raise UserError(f"{folder.root} exists and is not empty; {mend}.")
    if not paths and not any(word.startswith("--print_config") for word in settings):
        raise UserError(f"say what to do with --config RECIPE: a YAML file or one of {', '.join(recipe_names())}.")
    return FitRequest([(path, read_recipe(path)) for path in paths], settings, folder, resume)


def is_first_process() -> bool:
    """Whether this is the process that the user started, rather than one that a launcher made for another device."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def say(*lines: str) -> None:
    """Prints for the user, at once, from the first process only."""
    if is_first_process():
        print(*lines, sep="\n", file=sys.stdout, flush=True)
