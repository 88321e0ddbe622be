"""`mep plan`: how much memory every method takes on a base, before anything is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mep_lightning.commands.options import Options
from mep_lightning.errors import UserError
from mep_lightning.run_folder import replacing

if TYPE_CHECKING:
    from mep_lightning.plan import Budget, Row

EPILOG = """\
Nothing is loaded and no GPU is needed: the real training step runs on tensors that hold nothing. A hub id fetches its
JSON files alone; sd15, sd21 and sdxl need not even that.

examples:
  mep plan
  mep plan --base sd21 --resolution 512 --budget 4GB
  mep plan --base models/my-base --precision int8 --json
  mep plan --devices 2
"""
NUMBERS = ("a run", "libraries", "pictures")
"""Columns of the table that are flush right."""


def run(argv: Sequence[str]) -> int:
    """Runs `mep plan`."""
    options = _options().parse_args(list(argv))
    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.defaults import METHODS

    names = [name for word in options.methods or METHODS for name in word.split(",") if name]
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods {unknown[0]}: there is no such method; choose one of {', '.join(METHODS)}.")
    quiet_after_imports()
    from mep_lightning.bases.load import PRECISIONS
    from mep_lightning.commands.budget import available_precisions, recipe
    from mep_lightning.data import check_resolution
    from mep_lightning.distributed import STRATEGIES
    from mep_lightning.plan import Budget, parse_size, plan

    precisions = options.precision or available_precisions()
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise UserError(f"--precision {unknown[0]} is unknown; choose one of {', '.join(PRECISIONS)}.")
    if options.resolution is not None:
        check_resolution(options.resolution)
    if options.devices < 1:
        raise UserError(f"--devices {options.devices}: a run needs 1 or more.")
    if options.strategy not in (None, *STRATEGIES):
        raise UserError(f"--strategy {options.strategy} is unknown; choose one of {', '.join(STRATEGIES)}.")
    if options.strategy is not None and options.devices == 1:
        raise UserError(f"--strategy {options.strategy} is for several processes; add --devices 2 or more.")
    budget = Budget(parse_size(options.budget), options.device) if options.budget else None
    left_out: dict[str, str] = {}

    def tell(precision: str) -> None:
        if sys.stderr.isatty():
            print(f"\rRehearsing in {precision} …\x1b[K", end="", file=sys.stderr, flush=True)

    rows = plan(
        {name: recipe(name) for name in names},
        options.base,
        resolution=options.resolution,
        device=options.device,
        precisions=precisions,
        devices=options.devices,
        strategy=options.strategy,
        left_out=left_out.__setitem__,
        progress=tell,
    )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if not rows and left_out:
        raise UserError("; ".join(f"{name}: {why}" for name, why in left_out.items()) + ".")
    if not rows:
        raise UserError(
            f"--precision {' '.join(precisions)}: {' and '.join(names)} cannot be trained on such weights; add fp32."
        )
    if options.json:
        fits = [None if budget is None else budget.fits(row) for row in rows]
        told = [row.as_dict(fit) for row, fit in zip(rows, fits, strict=True)]
        print(json.dumps({"rows": told, "left_out": left_out}, indent=2))
    else:
        notes = [f"Without {name}: {why}." for name, why in left_out.items()]
        print("\n".join([*_table(rows, budget, options.device, options.resolution), *notes]))
    if options.picture:
        from mep_lightning.evaluation.plots import plan_figure

        with replacing(Path(options.picture)) as temporary:
            plan_figure(rows, None if budget is None else budget.tensors).savefig(temporary, format="png", dpi=144)
    return 0


def _options() -> Options:
    parser = Options("plan", "Predicts the peak memory of every method on a base, without loading it.", EPILOG)
    parser.add_argument(
        "--base", default="sd15", help="sd15, sd21, sdxl, tiny, a folder, file or hub id (default: %(default)s)"
    )
    parser.add_argument("--resolution", type=int, metavar="PX", help="side of the photos (default: the base's own)")
    parser.add_argument("--budget", metavar="SIZE", help="say what fits into so much, such as 4GB")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="which methods; a,b or a b (default: all)")
    parser.add_argument("--precision", nargs="+", metavar="NAME", help="which precisions (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train (default: cuda)")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="how many share a run, as trainer.devices (default: 1)"
    )
    parser.add_argument(
        "--strategy", metavar="NAME", help="how: zo_ddp, zo_ddp_data or ddp (default: what suits each method)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--picture", metavar="FILE", help="draw the rows as bars into a PNG file")
    return parser


def _table(rows: Sequence[Row], budget: Budget | None, device: str, resolution: int | None) -> list[str]:
    """The rows for people, and what the budget says."""
    from mep_lightning.bases.skeleton import packaged
    from mep_lightning.commands.budget import least
    from mep_lightning.errors import human
    from mep_lightning.plan import best, savings
    from mep_lightning.plan.budget import overhead

    first = rows[0]
    each = f"on each of {first.devices} devices, " if first.devices > 1 else ""
    lines = [
        f"Peak memory on {first.base} at {first.resolution} px, batch 1, {each}in tensors "
        f"(+ about {human(overhead(device))} for the {'CUDA context' if device == 'cuda' else 'interpreter'}):",
        "",
        *_columns(rows, budget),
    ]
    if budget is None:
        return lines
    taken = best(rows, budget)
    if taken is None:
        return [*lines, "", f"Nothing fits into {human(budget.size)}: {least(rows, device)}."]
    base = "ID_OR_DIR" if first.base in packaged() else first.base
    words = " ".join(
        [
            *("mep fit --config", taken.method, "--model.base", base, *taken.settings, *taken.launch),
            *(() if resolution is None else ("--data.resolution", str(resolution))),
            *(("--trainer.accelerator", "cpu") if device == "cpu" else ()),
        ]
    )
    lines += ["", f"Into {human(budget.size)} fits: {words}"]
    return lines + [f"  {switch} would save {human(size)} more" for switch, size in list(savings(rows, taken))[:4]]


def _columns(rows: Sequence[Row], budget: Budget | None) -> list[str]:
    """A line a row under its titles; a column is as wide as its longest word, and gone where nothing is in it."""
    from mep_lightning.errors import human

    columns: dict[str, list[str]] = {
        "method": [row.method for row in rows],
        "precision": [row.precision for row in rows],
        "switch": [", ".join(row.switches) for row in rows],
        "strategy": [row.strategy or "" for row in rows],
        "a run": [human(row.peak_bytes) for row in rows],
        "libraries": [f"+ {human(row.workspaces_bytes)}" if row.workspaces_bytes else "" for row in rows],
        "highest in": [row.peak_phase for row in rows],
        "pictures": [human(row.inference_peak_bytes) for row in rows],
        "": ["fits" if budget is not None and budget.fits(row) else "" for row in rows],
    }
    padded = []
    for title, words in columns.items():
        if any(words):
            side = ">" if title in NUMBERS else "<"
            width = max(map(len, (title, *words)))
            padded.append([f"{word:{side}{width}}" for word in (title, *words)])
    return [f"  {'  '.join(line)}".rstrip() for line in zip(*padded, strict=True)]
