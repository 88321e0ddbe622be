"""`mep test`: generates the evaluation prompts and scores the pictures; trains nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mep_lightning.commands.options import Options
from mep_lightning.commands.predict import (
    add_generation_options,
    check_generation_options,
    save_pictures,
    show_progress,
)
from mep_lightning.errors import UserError
from mep_lightning.run_folder import write_atomically

if TYPE_CHECKING:
    from mep_lightning import SubjectData
    from mep_lightning.commands.learned import Learned

EPILOG = """\
scores, written to metrics.json in the run's folder:
  clip_t      pictures against their prompts, the token taken out   higher is better
  clip_i      pictures against the subject's photos, by CLIP        higher is better
  dino        pictures against the subject's photos, by DINO        higher is better
  dino_inter  pictures of a prompt among themselves                 lower is more diverse
"""


def run(argv: Sequence[str]) -> int:
    """Runs `mep test`."""
    parser = Options("test", "Generates the evaluation prompts and scores the pictures.", EPILOG)
    parser.add_argument(
        "--prompts", metavar="FILE", help="one a line, {} where the subject goes (default: the papers')"
    )
    parser.add_argument("--images-per-prompt", type=int, default=4, metavar="K", help="default 4")
    parser.add_argument("--data", metavar="DIR", help="the subject's photos (default: those it was trained on)")
    parser.add_argument("--clip", metavar="ID_OR_DIR", help="CLIP checkpoint (default: ViT-B/32; for tiny its own)")
    parser.add_argument("--dino", metavar="ID_OR_DIR", help="DINO checkpoint (default: ViT-S/16; for tiny its own)")
    add_generation_options(parser)
    options = parser.parse_args(list(argv))
    check_generation_options(options)
    if options.images_per_prompt < 1:
        raise UserError(f"--images-per-prompt is {options.images_per_prompt}; use 1 or more.")
    templates = read_prompts(Path(options.prompts).expanduser()) if options.prompts else None

    from mep_lightning.commands.chatter import quiet_after_imports
    from mep_lightning.commands.learned import open_learned
    from mep_lightning.evaluation import default_encoders, evaluate, fill, generate, prompts_for, write_report

    quiet_after_imports()
    learned = open_learned(options.run, options.base, options.precision, options.class_word, options.device)
    data = _data(learned, options.data)
    base = learned.module.base
    assert base is not None
    phrase, word = learned.module.adapter.phrase(data.class_word), data.class_word
    texts = [learned.fill(fill(template, phrase, word)) for template in templates or prompts_for(word, base.family)]
    prompts = [text for text in texts for _ in range(options.images_per_prompt)]
    seeds = [options.seed + i for _ in texts for i in range(options.images_per_prompt)]
    steps = options.steps or learned.values["sampling_steps"]
    guidance = learned.values["guidance"] if options.guidance is None else options.guidance
    print(f"Drawing {len(prompts)} pictures of {len(texts)} prompts, {steps} steps each.", flush=True)
    images = generate(learned.module, prompts, seeds, steps=steps, guidance=guidance, progress=show_progress)
    how = {"steps": steps, "guidance": guidance}
    save_pictures(learned.folder.root / "evaluation", images, prompts, seeds, how)

    clip, dino = default_encoders(base.family)
    clip, dino = options.clip or clip, options.dino or dino
    scores = evaluate(images, prompts, data.photos, clip=clip, dino=dino, token=learned.token, device=base.device)
    details = {"prompts": len(texts), "images_per_prompt": options.images_per_prompt, "seed": options.seed, **how}
    write_scores(learned.folder.metrics, scores, details | {"clip": _name(clip), "dino": _name(dino)})
    if learned.folder.config.is_file():
        write_report(learned.folder)
    for name, score in scores.items():
        print(f"{name:<12}{score:.4f}")
    print(f"Pictures, metrics.json and report.html are in {learned.folder.root}.")
    return 0


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        UserError: no such file, not text, or nothing in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise UserError(
            f"--prompts {path}: cannot be read ({reason}); give a text file with a prompt a line."
        ) from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt; write one a line, with {{}} where the subject goes.")
    return prompts


def write_scores(path: Path, scores: dict[str, float], details: dict[str, Any]) -> None:
    """Writes metrics.json: the scores at the top, and how they were made. NaN, which JSON lacks, becomes null."""
    finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
    write_atomically(path, json.dumps({**finite, "settings": details}, indent=2) + "\n")


def _data(learned: Learned, folder: str | None) -> SubjectData:
    """The subject's photos, as config.yaml names them unless said otherwise."""
    from mep_lightning import SubjectData

    said = learned.settings.get("data") or {}
    path = folder or said.get("path")
    if path is None and not learned.settings:
        raise UserError(f"{learned.folder.root} holds no config.yaml that says where the photos are; add --data DIR.")
    data = SubjectData(path, class_word=learned.class_word)
    data.setup("test")
    return data


def _name(checkpoint: object) -> str:
    """How metrics.json names an encoder: a hub id as it is, a folder by its last part."""
    text = str(checkpoint)
    return Path(text).name if Path(text).is_dir() else text
