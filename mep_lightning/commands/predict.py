"""`mep predict`: pictures of the learned subject."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mep_lightning.commands.options import Options
from mep_lightning.errors import UserError
from mep_lightning.run_folder import replacing

if TYPE_CHECKING:
    from PIL import Image

EPILOG = """\
examples:
  mep predict --run runs/zoodip-1 --prompts "a photo of a <sks> dog on a beach" "a <sks> dog in a red hat"
  mep predict --run exported/ --base ID_OR_DIR --prompts "a photo of a {}" --class-word dog --count 4
"""


def run(argv: Sequence[str]) -> int:
    """Runs `mep predict`."""
    parser = Options("predict", "Generates pictures of the learned subject.", EPILOG)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT", help="{} stands for the subject")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pictures a prompt (default 1)")
    parser.add_argument("--out", metavar="DIR", help="where the PNGs go (default: predictions/ in the run's folder)")
    add_generation_options(parser)
    options = parser.parse_args(list(argv))
    check_generation_options(options)
    if options.count < 1:
        raise UserError(f"--count is {options.count}; use 1 or more.")

    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.commands.learned import open_learned
    from mep_lightning.evaluation import generate

    quiet_after_imports()
    learned = open_learned(options.run, options.base, options.precision, options.class_word, options.device)
    prompts = [learned.fill(text) for text in options.prompts for _ in range(options.count)]
    seeds = [options.seed + i for _ in options.prompts for i in range(options.count)]
    if absent := [text for text in prompts if learned.token not in text.split()]:
        print(f"Note: the subject is not in {absent[0]!r}; write {learned.token} or {{}} where it goes.")
    steps = options.steps or learned.values["sampling_steps"]
    guidance = learned.values["guidance"] if options.guidance is None else options.guidance
    images = generate(learned.module, prompts, seeds, steps=steps, guidance=guidance, progress=show_progress)
    folder = Path(options.out).expanduser() if options.out else learned.folder.root / "predictions"
    for path in save_pictures(folder, images, prompts, seeds, {"steps": steps, "guidance": guidance}):
        print(path)
    return 0


def add_generation_options(parser: Options) -> None:
    """What `mep predict` and `mep test` both take."""
    parser.add_argument("--run", required=True, metavar="DIR", help="a run's folder, or one that holds an export")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of a prompt's first picture (default 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the base's own)")
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the base's own)")
    parser.add_argument("--base", metavar="ID_OR_DIR", help="the base, if no config.yaml says it or for another one")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8"), help="default: as trained")
    parser.add_argument("--class-word", metavar="WORD", help="what the subject is, if no config.yaml says it")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default)")


def check_generation_options(options: object) -> None:
    """Refuses numbers out of range before anything is loaded."""
    steps, seed = getattr(options, "steps"), getattr(options, "seed")  # noqa: B009  (an argparse namespace)
    if steps is not None and steps < 1:
        raise UserError(f"--steps is {steps}; use 1 or more.")
    if seed < 0:
        raise UserError(f"--seed is {seed}; use 0 or more.")


def show_progress(done: int, total: int) -> None:
    """One line that counts pictures, where someone is watching."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)


def save_pictures(
    folder: Path, images: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int], how: dict[str, float]
) -> list[Path]:
    """Writes PNGs named after prompt and seed, with what made them in their text fields."""
    from PIL.PngImagePlugin import PngInfo

    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    paths = []
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = folder / f"{numbers[prompt]:02d}-{slug}-seed{seed}.png"
        info = PngInfo()
        for key, value in {"prompt": prompt, "seed": seed, **how}.items():
            info.add_itxt(key, str(value))
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
        paths.append(path)
    return paths
