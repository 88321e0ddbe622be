"""`python -m benchmarks SUITE --out FILE.json`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.documents import scores, sheets, tables
from benchmarks.trained.tune import AXES
from benchmarks.trained.variants import SUITES

PERFORMANCE = ("step", "methods", "memory", "kernels", "autoencoder", "fidelity", "profile")
"""What `all` runs: the suites of speed, memory and rounding, which need no hours of training; on a CPU no profile."""
BASES = ("tiny", "sd15", "sd21", "sdxl")
"""Bases whose figures have a file of their own."""
ALONE = {
    "published": "ZOODiP's column of training memory, planned for public scripts of its methods",
    "branches": "where the steps of selective optimisation point, on tiny",
    "conditioning": "where a token's gradient lies, on tiny",
    "pairs": "whether antithetic draws or control variates could help, on tiny",
    "heard": "what a step hears of the way to go, by where its timestep lies, on tiny",
    "paths": "how fast tokens learn, and in how few dimensions, on tiny",
}
"""Suites without options; each is the `run` of the module of its name."""
TRAINED = {
    "quality": ("methods on subjects of the tiny world", 8, 3),
    "ablation": ("ZOODiP with one part changed, on subjects of the tiny world", 3, 3),
    "subspace": ("ZOODiP with other settings of Subspace Gradient, on a subject of the tiny world", 1, 1),
    "timesteps": ("Textual Inversion on part of the timesteps, on subjects of the tiny world", 3, 3),
    "precision": ("ZOODiP on the base in every precision, likewise", 8, 3),
    "forward": ("finite differences and tangents in half precision, likewise", 8, 3),
    "estimators": ("ways to a token in as many forward passes, likewise", 4, 1),
    "search": ("gradient-free search as it is and as its public code does, likewise", 3, 1),
    "loras": ("LoRA whole, hollowed and selectively optimised, likewise", 8, 3),
    "tune": ("a method's values for the embedded base, on subjects that are not reported", 3, 1),
    "compare": ("all methods of the papers' tables, through `mep compare`, on tiny", 10, 3),
}
"""Suites of trained cells: what each is of, and how many subjects and seeds the whole of it has."""
FOLDERS = {
    "styles": "styles.png, styles of the tiny world on other objects",
    "learned": "learned_precisions.png, tokens that were learned on int8 and on int4 weights",
}
"""Sheets whose pictures runs draw that they train."""
UNCHANGING = ("suite", "out", "method", "workers", "rounds", "sheet", "folder", "device", "base")
"""Options that leave a suite whole: how long it takes, or which file its figures are kept in."""


def main() -> None:
    suites = parser()
    args = suites.parse_args()
    if args.suite == "tables":
        tables.write()
        return
    if args.suite == "cost":
        print("\n".join(tables.shown(name for name in tables.TABLES if name.endswith(":cost"))))
        return
    if args.suite == "precisions":
        sheets.precisions()
        return
    if args.suite in FOLDERS:
        {"styles": sheets.styles, "learned": sheets.learned}[args.suite](args.folder)
        return
    on_gpu = getattr(args, "device", "cpu").startswith("cuda")
    names = [name for name in PERFORMANCE if name != "profile" or on_gpu] if args.suite == "all" else [args.suite]
    if args.out is None and not _is_whole(args, suites):
        suites.error("this is not the whole suite as it is committed: say where its figures go with --out FILE.json")
    if args.suite == "all" and args.out is not None and args.out.suffix:
        suites.error(f"all writes a file a suite: {args.out} must be a folder")
    for name in names:
        if args.suite == "all":
            path = (args.out or rows.RESULTS) / default_path(name, args).relative_to(rows.RESULTS)
        else:
            path = args.out or default_path(name, args)
        # A cell's worker has one thread; what all else is measured with is this process's.
        about = rows.measured_with(getattr(args, "device", "cpu"), threads=1 if hasattr(args, "workers") else None)
        gc.collect()  # what the last suite held would be in this one's memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows.write(RUN[name](args, path), path, about)
        print(f"written: {path}")


def parser() -> argparse.ArgumentParser:
    """Every suite with its options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = top.add_subparsers(dest="suite", required=True)
    step = suites.add_parser("step", help="a zeroth-order step: members together beside one after the other")
    methods = suites.add_parser("methods", help="a training and a denoising step of every method at a base's real size")
    memory = suites.add_parser("memory", help="planned and measured peaks at a base's real size, with made-up weights")
    kernels = suites.add_parser("kernels", help="every operation at SD1.5's layer sizes beside a library's")
    autoencoder = suites.add_parser(
        "autoencoder", help="SD1.5's autoencoder in bands of rows, beside the same whole and diffusers'"
    )
    fidelity = suites.add_parser("fidelity", help="how true a finite difference is in every precision, on tiny")
    profile = suites.add_parser("profile", help="where a GPU's time goes in a step at a base's real size")
    profile.set_defaults(device="cuda")
    everything = suites.add_parser("all", help=f"{', '.join(PERFORMANCE)}; --out is a folder")
    for suite in (step, methods, memory, profile, everything):
        suite.add_argument("--base", default="tiny" if suite is step else "sd15", help="tiny, sd15, sd21 or sdxl")
    for suite in (step, methods, memory, kernels, autoencoder, fidelity, everything):
        suite.add_argument("--device", default="cpu", help="cpu or cuda")
    for suite in (step, methods, kernels, profile, everything):
        suite.add_argument("--rounds", type=int, default=15)
    for suite in (step, everything):
        suite.add_argument("--compile", action="store_true", help="let the ordinary step go through torch.compile")
    for suite in (memory, everything):
        suite.add_argument("--resolution", type=int, default=None)
        suite.add_argument("--plan-only", action="store_true", help="measure no memory: a large base takes a CPU long")

    for name, (what, subjects, seeds) in TRAINED.items():
        suite = suites.add_parser(name, help=what)
        suite.add_argument("--subjects", type=int, default=subjects)
        suite.add_argument("--seeds", type=int, default=seeds)
        suite.add_argument("--images", type=int, default=2, help="pictures a prompt")
        suite.add_argument("--workers", type=int, default=2)
        if name in SUITES:
            suite.add_argument("--variants", nargs="+", metavar="NAME", choices=SUITES[name], default=None)
            suite.add_argument("--split", choices=["test", "tune"], default="test")
            suite.add_argument("--device", default="cpu", help="cpu or cuda")
    suites.choices["tune"].add_argument("--method", choices=list(AXES), required=True)
    suites.choices["compare"].add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="of the comparison, to carry on with"
    )
    suites.choices["compare"].add_argument(
        "--memory", type=Path, metavar="DIR", help="first measure memory anew, by short trainings in this folder"
    )
    for name, what in ALONE.items():
        suites.add_parser(name, help=what)
    several = suites.add_parser("several", help="subjects an hour, one at a time and several in a batch, on tiny")
    several.add_argument("--rounds", type=int, default=3)
    tiny = suites.add_parser("tiny", help="how good the embedded base is: prompt-following, reconstruction, a sheet")
    tiny.add_argument("--sets", type=int, default=4, help="sets of 32 captions")
    tiny.add_argument("--sheet", type=Path, default=None, help="PNG of the first set's pictures")
    for suite in suites.choices.values():
        suite.add_argument("--out", type=Path, default=None, help="JSON (default: in benchmarks/results)")
    suites.add_parser("precisions", help="draw docs/images/precisions.png, the embedded base in every precision")
    for name, what in FOLDERS.items():
        sheet = suites.add_parser(name, help=f"draw docs/images/{what}")
        sheet.add_argument("--folder", type=Path, default=Path(f"runs/{name}"), help="of the runs, which are kept")
    suites.add_parser("cost", help="what a million subjects take on SD1.5, from the figures in benchmarks/results")
    suites.add_parser("tables", help="write the tables and plots of docs/ anew from benchmarks/results")
    return top


def default_path(suite: str, args: argparse.Namespace) -> Path:
    """Where a whole suite's figures are committed: a folder for GPUs, a name for a base other than tiny."""
    folder = rows.RESULTS / "cuda" if getattr(args, "device", "cpu").startswith("cuda") else rows.RESULTS
    about = (
        args.method if suite == "tune" else args.base if suite in ("step", "methods", "memory", "profile") else "tiny"
    )
    return folder / (f"{suite}.json" if about == "tiny" else f"{suite}-{about}.json")


def _is_whole(args: argparse.Namespace, suites: argparse.ArgumentParser) -> bool:
    choices = next(a for a in suites._actions if isinstance(a, argparse._SubParsersAction)).choices
    default = choices[args.suite].get_default
    has_name = getattr(args, "base", "tiny") in BASES
    return has_name and all(getattr(args, key) == default(key) for key in vars(args) if key not in UNCHANGING)


def _step(args: argparse.Namespace, _: Path) -> list[rows.Row]:
    from benchmarks.performance import real_step, step

    if args.base == "tiny":
        return step.run(args.rounds, args.device)
    return real_step.run(args.base, args.rounds, args.device, args.compile)


def _methods(args: argparse.Namespace, _: Path) -> Iterable[rows.Row]:
    from benchmarks.performance import methods

    return methods.run(args.base, args.rounds, args.device)


def _memory(args: argparse.Namespace, _: Path) -> Iterable[rows.Row]:
    from benchmarks.performance import memory

    return memory.run(args.base, args.device, args.resolution, measured=not args.plan_only)


def _profile(args: argparse.Namespace, _: Path) -> list[rows.Row]:
    from benchmarks.performance import profiling

    return profiling.run(args.base, args.rounds, args.device)


def _kernels(args: argparse.Namespace, _: Path) -> Iterable[rows.Row]:
    from benchmarks.performance import kernels

    return kernels.run(args.rounds, args.device)


def _autoencoder(args: argparse.Namespace, _: Path) -> Iterable[rows.Row]:
    from benchmarks.performance import autoencoder

    return autoencoder.run(device=args.device)


def _fidelity(args: argparse.Namespace, _: Path) -> list[rows.Row]:
    from benchmarks.performance import fidelity

    return fidelity.run(device=args.device)


def _alone(args: argparse.Namespace, _: Path) -> Iterable[rows.Row]:
    measured: Iterable[rows.Row] = import_module(f"benchmarks.studies.{args.suite}").run()
    return measured


def _several(args: argparse.Namespace, _: Path) -> list[rows.Row]:
    from benchmarks.performance import several

    return several.run(args.rounds)


def _compare(args: argparse.Namespace, path: Path) -> list[rows.Row]:
    from benchmarks.trained import comparison

    kept = path.with_suffix(".jsonl")
    if args.memory is not None:
        comparison.measure_memory(args.memory, kept, images=args.images, workers=args.workers)
    size = {key: getattr(args, key) for key in ("subjects", "seeds", "images", "workers")}
    found = comparison.run(args.folder, kept, **size)
    if path.parent == rows.RESULTS:
        made_with = comparison.keys(args.images)
        sheets.methods(args.folder, made_with)
        sheets.prompts(args.folder, made_with)
        sheets.diversity(args.folder, made_with, args.seeds, args.images)
    return found


def _tiny(args: argparse.Namespace, _: Path) -> list[rows.Row]:
    from benchmarks.studies import tiny

    return tiny.run(args.sets, args.sheet)


def _cells(args: argparse.Namespace, path: Path) -> list[rows.Row]:
    """Trained cells, kept line by line beside the figures."""
    from benchmarks.trained import quality, tune

    size = {key: getattr(args, key) for key in ("subjects", "seeds", "images", "workers")}
    cells = path.with_suffix(".jsonl")
    if args.suite == "tune":
        return tune.run(args.method, cells, **size)
    measured = quality.run(args.suite, cells, args.variants, split=args.split, device=args.device, **size)
    print(scores.scores(measured))
    return measured


RUN: dict[str, Callable[[argparse.Namespace, Path], Iterable[rows.Row]]] = {
    "step": _step,
    "methods": _methods,
    "memory": _memory,
    "kernels": _kernels,
    "autoencoder": _autoencoder,
    "profile": _profile,
    "fidelity": _fidelity,
    "several": _several,
    "tiny": _tiny,
    **dict.fromkeys(ALONE, _alone),
    **dict.fromkeys((*SUITES, "tune"), _cells),
    "compare": _compare,
}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # what was measured so far is kept
        raise SystemExit(130) from None
