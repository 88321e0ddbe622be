"""`python -m reliability kill | mutate | soak`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import rows

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    args = parser().parse_args()
    if args.suite == "tables":
        from reliability import tables

        tables.write()
        return
    whole = all(getattr(args, key) == value for key, value in WHOLE[args.suite].items())
    if args.out is None and not whole:
        raise SystemExit(
            "this is not the whole suite as it is committed: say where its figures go with --out FILE.json"
        )
    path = args.out or RESULTS / f"{args.suite}.json"
    about = rows.measured_with(threads=1)
    found = RUN[args.suite](args)
    rows.write(found, path, about)
    for one in found:
        print(f"{one['case']:<32}{one['metric']:<40}{one['value']:>12.6g} {one['unit']}")
    print(f"written: {path}")


def parser() -> argparse.ArgumentParser:
    """Every suite with its options."""
    top = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    suites = top.add_subparsers(dest="suite", required=True)
    kill = suites.add_parser("kill", help="kill runs at random moments, resume them, compare exports bit by bit")
    kill.add_argument("--kills", type=int, default=WHOLE["kill"]["kills"])
    mutate = suites.add_parser("mutate", help="feed damaged files to what reads them")
    mutate.add_argument("--cases", type=int, default=WHOLE["mutate"]["cases"])
    mutate.add_argument("--workers", type=int, default=2)
    mutate.add_argument("--only", default=None, metavar="KIND", help="one kind of file")
    soak = suites.add_parser("soak", help="train for long in one process, and look whether memory and speed stay")
    soak.add_argument("--steps", type=int, default=WHOLE["soak"]["steps"])
    for suite in (kill, mutate):
        suite.add_argument("--seed", type=int, default=0)
    for suite in (kill, mutate, soak):
        suite.add_argument("--out", type=Path, default=None, help="JSON (default: in reliability/results)")
    suites.add_parser("tables", help="write the tables of docs/reliability.md anew from reliability/results")
    return top


WHOLE: dict[str, dict[str, int]] = {"kill": {"kills": 50}, "mutate": {"cases": 2000}, "soak": {"steps": 20_000}}
"""The size of a suite as it is committed."""


def _kill(args: argparse.Namespace) -> list[rows.Row]:
    from reliability import kill

    return kill.run(args.kills, args.seed)


def _mutate(args: argparse.Namespace) -> list[rows.Row]:
    from reliability import mutate

    return mutate.run(args.cases, args.seed, workers=args.workers, only=args.only)


def _soak(args: argparse.Namespace) -> list[rows.Row]:
    from reliability import soak

    return soak.run(args.steps)


RUN: dict[str, Callable[[argparse.Namespace], list[rows.Row]]] = {"kill": _kill, "mutate": _mutate, "soak": _soak}


if __name__ == "__main__":
    main()
