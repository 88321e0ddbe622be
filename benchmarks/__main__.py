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
    tiny = suites.add_parser("tiny", help="how good the embedded base is: prompt-following, reconstruction, a sheet")
    tiny.add_argument("--sets", type=int, default=4, help="sets of 32 captions")
    tiny.add_argument("--sheet", type=Path, default=None, help="PNG of the first set's pictures")
    for suite in (step, quality, tiny):
        suite.add_argument("--out", type=Path, default=None, help="JSON (default benchmarks/results/SUITE.json)")
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"{args.suite}.json"

    if args.suite == "step":
        from benchmarks.step import run

        measured = run(args.rounds)
    elif args.suite == "tiny":
        from benchmarks.tiny import run

        measured = run(args.sets, args.sheet)
    else:
        from benchmarks.quality import run, table

        measured = run(
            out.with_suffix(".jsonl"),
            args.variants,
            split=args.split,
            subjects=args.subjects,
            seeds=args.seeds,
            images=args.images,
            workers=args.workers,
        )
        print(table(measured))
    rows.write(measured, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
