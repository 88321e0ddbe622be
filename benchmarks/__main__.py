"""`python -m benchmarks SUITE --out FILE.json`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import reproduction, rows
from benchmarks.quality import SUITES

UNCHANGING = ("suite", "out", "method", "workers", "rounds", "sheet")
"""Options that leave a suite whole."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    step = suites.add_parser("step", help="the batched zeroth-order step beside members one after the other")
    step.add_argument("--rounds", type=int, default=15)
    step.add_argument("--device", default="cpu", help="cpu or cuda")
    step.add_argument("--base", default="tiny", help="tiny; or sd15, sd21: at its real size, beside the ordinary step")
    step.add_argument("--compile", action="store_true", help="let the ordinary step go through torch.compile")
    quality = suites.add_parser("quality", help="methods on subjects of the tiny world")
    ablation = suites.add_parser("ablation", help="ZOODiP with one part changed, on subjects of the tiny world")
    for suite in (quality, ablation):
        suite.add_argument(
            "--variants", nargs="+", metavar="NAME", choices=SUITES[suite.prog.split()[-1]], default=None
        )
        suite.add_argument("--split", choices=["test", "tune"], default="test")
    tune = suites.add_parser("tune", help="a method's values for the embedded base, on subjects that are not reported")
    tune.add_argument("--method", choices=["textual_inversion", "zoodip"], required=True)
    for suite, subjects, seeds, images in ((quality, 8, 3, 2), (ablation, 3, 3, 2), (tune, 3, 1, 2)):
        suite.add_argument("--subjects", type=int, default=subjects)
        suite.add_argument("--seeds", type=int, default=seeds)
        suite.add_argument("--images", type=int, default=images, help="pictures a prompt")
        suite.add_argument("--workers", type=int, default=2)
    tiny = suites.add_parser("tiny", help="how good the embedded base is: prompt-following, reconstruction, a sheet")
    tiny.add_argument("--sets", type=int, default=4, help="sets of 32 captions")
    tiny.add_argument("--sheet", type=Path, default=None, help="PNG of the first set's pictures")
    memory = suites.add_parser("memory", help="planned and measured peaks at a base's real size, with made-up weights")
    memory.add_argument("--base", default="sd15", help="sd15, sd21, tiny, a folder or a hub id")
    memory.add_argument("--resolution", type=int, default=None)
    memory.add_argument("--device", default="cpu", help="cpu or cuda")
    for suite in (step, quality, ablation, tune, tiny, memory):
        suite.add_argument("--out", type=Path, default=None, help="JSON (default: in benchmarks/results)")
    suites.add_parser("reproduction", help="write the tables of docs/reproduction.md anew from benchmarks/results")
    parsers = suites.choices
    args = parser.parse_args()
    if args.suite == "reproduction":
        reproduction.DOCUMENT.write_text(reproduction.render(reproduction.DOCUMENT.read_text()))
        return
    name = f"tune-{args.method}" if args.suite == "tune" else args.suite
    out = args.out or Path(__file__).parent / "results" / f"{name}.json"
    whole = all(
        getattr(args, key) == parsers[args.suite].get_default(key) for key in vars(args) if key not in UNCHANGING
    )
    if args.out is None and not whole:
        parser.error("this is not the whole suite as it is committed: say where its figures go with --out FILE.json")
    about = rows.measured_with(getattr(args, "device", "cpu"), threads=1 if hasattr(args, "workers") else None)

    if args.suite == "step":
        from benchmarks import real_step
        from benchmarks import step as members

        if args.base == "tiny":
            measured = members.run(args.rounds, args.device)
        else:
            measured = real_step.run(args.base, args.rounds, args.device, args.compile)
    elif args.suite == "memory":
        from benchmarks.memory import run

        measured = run(args.base, args.device, args.resolution)
    elif args.suite == "tiny":
        from benchmarks.tiny import run

        measured = run(args.sets, args.sheet)
    else:
        cells = out.with_suffix(".jsonl")
        size = {key: getattr(args, key) for key in ("subjects", "seeds", "images", "workers")}
        if args.suite == "tune":
            from benchmarks.tune import run

            measured = run(args.method, cells, **size)
        else:
            from benchmarks.quality import run

            measured = run(args.suite, cells, args.variants, split=args.split, **size)
            print(reproduction.scores(measured))
    rows.write(measured, out, about)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
