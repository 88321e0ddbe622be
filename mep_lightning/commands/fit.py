"""`mep fit`: reads the recipes and finds the run's folder, before torch is imported."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise

from mep_lightning.commands.options import Options
from mep_lightning.commands.recipes import recipe_names
from mep_lightning.commands.request import RUNS, FitRequest, read_request
from mep_lightning.errors import UserError

EPILOG = """\
most used settings (each can also stand in a YAML file):
  --model.base ID_OR_DIR          a hub id, a folder in diffusers' layout, a .safetensors file, or tiny (default)
  --model.precision P             what its weights are kept in: fp32, bf16, fp16, int8 or int4
  --model.offload stream          weights wait in host memory and visit the GPU layer by layer
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
  mep fit --budget 4GB --model.base ID_OR_DIR --data.path photos/ --data.class_word dog
  mep fit --config zoodip --model.estimator SPSAEstimator --model.estimator.n 4
  mep fit --run runs/zoodip-1 --resume --trainer.max_steps 5000
"""


def run(argv: Sequence[str]) -> int:
    """Runs `mep fit`."""
    options, settings = _options().parse_known_args(list(argv))
    if options.help_all or any(re.fullmatch(r"--[\w.]+\.help", word) for word in settings):
        from mep_lightning.commands.training import show_all_options

        return show_all_options(["--help"] if options.help_all else settings)
    request = _request(options, settings)

    from mep_lightning.commands.training import train

    return train(request, budget=options.budget, planned=not options.no_plan)


def requested(argv: Sequence[str]) -> tuple[FitRequest, Namespace]:
    """What a command line asks for, and its options, for whoever runs it otherwise.

    Raises:
        UserError: as `read_request`.
    """
    options, settings = _options().parse_known_args(list(argv))
    return _request(options, settings), options


def _request(options: Namespace, settings: list[str]) -> FitRequest:
    if options.budget and options.resume:
        raise UserError("--budget chooses how a run begins; leave it out with --resume.")
    for before, word in pairwise(["", *settings]):
        is_value = before.startswith("-") and "=" not in before
        if not is_value and (word in recipe_names() or re.search(r"\.ya?ml$", word)):
            mend = "leave it out with --resume." if options.resume else f"did you mean --config {word}?"
            raise UserError(f"{word!r} stands alone; {mend}")
    chosen = options.budget is not None
    return read_request(options.config or [], settings, options.run, options.resume, chosen=chosen)


def _options() -> Options:
    listed = "\n".join(f"  {name}" for name in recipe_names())
    parser = Options("fit", "Learns a subject from a folder of photos.", f"packaged recipes:\n{listed}\n\n{EPILOG}")
    parser.add_argument(
        "--config", "-c", action="append", metavar="RECIPE", help="a packaged recipe or a YAML file; may repeat"
    )
    parser.add_argument("--run", metavar="DIR", help=f"the run's folder (default: {RUNS}/<method>-N)")
    parser.add_argument("--resume", action="store_true", help="carry on where the run in --run DIR stopped")
    parser.add_argument("--budget", metavar="SIZE", help="take what fits into so much memory, such as 4GB")
    parser.add_argument("--no-plan", action="store_true", help="begin even if the plan says that memory will run out")
    parser.add_argument("--help-all", action="store_true", help="every setting of the model, data and Trainer")
    return parser
