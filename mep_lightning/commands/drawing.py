"""What `mep predict` and `mep test` share: their options, opening what was learned, drawing and keeping pictures."""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mep_lightning.commands.options import Options
from mep_lightning.errors import SEEDS, refuse_unless
from mep_lightning.run_folder import TEMPORARY, write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from mep_lightning.commands.learned import Learned

SLUG = 60
"""Bytes of a prompt in a file's name, which may have 255."""


def add_options(parser: Options) -> None:
    """What both commands take."""
    parser.add_argument("--run", required=True, metavar="DIR", help="a run's folder, or one that holds an export")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of a prompt's first picture (default 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the base's own)")
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the base's own)")
    parser.add_argument("--base", metavar="ID_OR_DIR", help="default: as trained")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8", "int4"), help="default: as trained")
    parser.add_argument("--class-word", metavar="WORD", help="what the subject is (default: as trained)")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="W", help="a LoRA's strength (default 1)")
    parser.add_argument("--merge", action="store_true", help="add a LoRA to the base's weights: no layer is slower")
    parser.add_argument("--one-path", action="store_true", help="draw with a hollowed net's LoRA as other tools do")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default)")


def check_options(options: Namespace) -> None:
    """Refuses numbers out of range before anything is loaded."""
    refuse_unless(options.steps is None or options.steps >= 1, "--steps", options.steps, "1 or more")
    refuse_unless(0 <= options.seed < SEEDS, "--seed", options.seed, f"0 to {SEEDS - 1}")
    refuse_unless(math.isfinite(options.lora_scale), "--lora-scale", options.lora_scale, "a number")
    fine = options.guidance is None or math.isfinite(options.guidance)
    refuse_unless(fine, "--guidance", options.guidance, "a number")


def open_run(options: Namespace) -> Learned:
    """What was learned, as the options ask for it; not loaded yet.

    Raises:
        UserError: nothing learned is there.
    """
    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.commands.learned import open_learned

    quiet_after_imports()
    learned = open_learned(
        options.run, options.base, options.precision, options.class_word, options.device, options.lora_scale
    )
    learned.merged, learned.two_paths = options.merge, not options.one_path
    return learned


@dataclass
class Drawn:
    """Pictures with what made them.

    Attributes:
        images: `count` of each prompt, one prompt after the other.
        prompts: the prompt of each picture.
        seeds: the seed of each picture.
        how: steps and guidance.
    """

    images: list[Image.Image]
    prompts: list[str]
    seeds: list[int]
    how: dict[str, float]

    def save(self, folder: Path) -> list[Path]:
        """Writes PNGs named after prompt and seed, with what made them in their text fields.

        Where another picture has the name, as of another guidance, a number follows it: `00-a-ball-seed0-2.png`.
        """
        from PIL.PngImagePlugin import PngInfo

        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        paths = []
        for image, prompt, seed in zip(self.images, self.prompts, self.seeds, strict=True):
            info = PngInfo()
            for key, value in {"prompt": prompt, "seed": seed, **self.how}.items():
                info.add_itxt(key, str(value))
            png = io.BytesIO()
            image.save(png, format="PNG", pnginfo=info)
            stem = f"{numbers[prompt]:02d}-{_slug(prompt)}-seed{seed}"
            paths.append(write_atomically(_place(folder, stem, png.getvalue()), png.getvalue()))
        return paths


def _slug(prompt: str) -> str:
    """A prompt's letters and digits, in any script, as part of a file's name."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    return words.encode()[:SLUG].decode(errors="ignore")


def _place(folder: Path, stem: str, png: bytes) -> Path:
    """The first of `stem.png`, `stem-2.png`, ... that is free, or holds the very same picture."""
    for number in itertools.count(1):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if not path.exists() or (path.is_file() and path.read_bytes() == png):
            break
    return path


def draw(learned: Learned, texts: Sequence[str], count: int, options: Namespace) -> Drawn:
    """Generates `count` pictures of every prompt; the first of each starts from the same seed.

    Raises:
        UserError: more steps are asked for than the base's schedule has.
    """
    from mep_lightning.evaluation import generate

    total = len(learned.load(texts).scheduler.alphas_cumprod)
    fine = options.steps is None or options.steps <= total
    refuse_unless(fine, "--steps", options.steps, f"{total}, the base's timesteps, or less")
    prompts = [text for text in texts for _ in range(count)]
    seeds = [options.seed + i for _ in texts for i in range(count)]
    steps = options.steps or learned.values["sampling_steps"]
    guidance = learned.values["guidance"] if options.guidance is None else options.guidance
    together = learned.values["sampling_batch"]
    images = generate(
        learned.module,
        prompts,
        seeds,
        steps=steps,
        guidance=guidance,
        batch_size=together,
        progress=_show_progress,
    )
    return Drawn(images, prompts, seeds, {"steps": steps, "guidance": guidance})


def prepare_folder(folder: Path) -> None:
    """Makes a folder for pictures, so that one that cannot be written to is refused before hours of drawing.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{TEMPORARY}probe"
    probe.touch()
    probe.unlink()


def _show_progress(done: int, total: int) -> None:
    """One line that counts pictures, where someone is watching."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)
