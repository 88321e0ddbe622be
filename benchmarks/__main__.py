"""`python -m benchmarks SUITE --out FILE.json`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    step = suites.add_parser("step", help="the batched zeroth-order step beside members one after the other")
    step.add_argument("--rounds", type=int, default=15)
    quality = suites.add_parser("quality", help="methods and ablations on subjects of the tiny world")
    quality.add_argument("--variants", nargs="+", default=None)
    quality.add_argument("--split", choices=["test", "tune"], default="test")
    quality.add_argument("--subjects", type=int, default=8)
    quality.add_argument("--seeds", type=int, default=3)
    quality.add_argument("--images", type=int, default=2, help="pictures a prompt")
    quality.add_argument("--workers", type=int, default=2)
    for suite in (step, quality):
        suite.add_argument("--out", type=Path, default=None, help="JSON (default benchmarks/results/SUITE.json)")
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"{args.suite}.json"

    if args.suite == "step":
        from benchmarks import step as suite

        measured = suite.run(args.rounds)
    else:
        from benchmarks import quality as suite

        measured = suite.run(
            out.with_suffix(".jsonl"),
            args.variants,
            split=args.split,
            subjects=args.subjects,
            seeds=args.seeds,
            images=args.images,
            workers=args.workers,
        )
        print(suite.table(measured))
    rows.write(measured, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
