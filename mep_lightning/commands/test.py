"""`mep test`: generates the evaluation prompts and scores the pictures; trains nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mep_lightning.commands.drawing import add_options, check_options, draw, open_run, prepare_folder
from mep_lightning.commands.options import Options
from mep_lightning.errors import UserError, counted, refuse_unless
from mep_lightning.run_folder import write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from mep_lightning import SubjectData
    from mep_lightning.commands.learned import Learned

EPILOG = """\
scores, written to metrics.json in the run's folder:
  clip_t      pictures against their prompts, the token taken out   higher is better
  clip_i      pictures against the subject's photos, by CLIP        higher is better
  dino        pictures against the subject's photos, by DINO        higher is better
  dino_inter  pictures of a prompt among themselves                 lower is more diverse
              (with --images-per-prompt 1: of all prompts)
DINO is DreamBooth's ViT-S/16; ZOODiP's paper scores with --dino facebook/dinov2-base.
"""


def run(argv: Sequence[str]) -> int:
    """Runs `mep test`."""
    parser = Options("test", "Generates the evaluation prompts and scores the pictures.", EPILOG)
    parser.add_argument(
        "--prompts", metavar="FILE", help="one a line, {} where the subject goes (default: those of the base)"
    )
    parser.add_argument("--images-per-prompt", type=int, default=4, metavar="K", help="default 4")
    parser.add_argument("--data", metavar="DIR", help="the subject's photos (default: those it was trained on)")
    parser.add_argument("--clip", metavar="ID_OR_DIR", help="CLIP checkpoint (default: ViT-B/32; for tiny its own)")
    parser.add_argument("--dino", metavar="ID_OR_DIR", help="DINO checkpoint (default: ViT-S/16; for tiny its own)")
    add_options(parser)
    options = parser.parse_args(list(argv))
    check_options(options)
    refuse_unless(options.images_per_prompt >= 1, "--images-per-prompt", options.images_per_prompt, "1 or more")
    templates = read_prompts(Path(options.prompts).expanduser()) if options.prompts else None

    learned = open_run(options)
    from mep_lightning.evaluation import ClipEncoder, DinoEncoder, default_encoders, evaluate, write_report

    data = _data(learned, options.data)
    learned.class_word = data.class_word  # the sample photos bring their own
    prompts = texts(learned, templates)
    checkpoints = default_encoders(learned.module.family)
    clip, dino = options.clip or checkpoints[0], options.dino or checkpoints[1]
    clip_encoder, dino_encoder = ClipEncoder(clip), DinoEncoder(dino)  # a wrong name is told before hours of drawing
    run, folder = learned.folder, learned.folder.root / "evaluation"
    prepare_folder(folder)
    print(f"Drawing {counted(options.images_per_prompt, 'picture')} of each of {len(prompts)} prompts.", flush=True)
    drawn = draw(learned, prompts, options.images_per_prompt, options)
    for stale in folder.glob("*-seed*.png"):  # of an earlier test, perhaps of other prompts
        stale.unlink()
    drawn.save(folder)

    scores = evaluate(
        drawn.images,
        drawn.prompts,
        _as_trained_on(data),
        clip=clip_encoder,
        dino=dino_encoder,
        token=learned.module.adapter.phrase(learned.class_word),
        device=learned.base.device,
    )
    details = {
        "prompts": len(prompts),
        "images_per_prompt": options.images_per_prompt,
        "seed": options.seed,
        **drawn.how,
    }
    write_scores(run.metrics, scores, details | {"clip": _name(clip), "dino": _name(dino)})
    written = [folder, run.metrics]
    if run.config.is_file():
        written.append(write_report(run))
    for name, score in scores.items():
        print(f"{name:<12}{score:.4f}")
    print(f"In {run.root}: {', '.join(path.name for path in written)}.")
    return 0


def texts(learned: Learned, templates: Sequence[str] | None) -> list[str]:
    """The prompts with the subject filled in: those of a file, or the base's own.

    Raises:
        UserError: a prompt without the subject, whose pictures would show nothing of what was learned.
    """
    from mep_lightning.evaluation import prompts_for

    found = []
    is_style = learned.module.adapter.is_style
    for template in templates or prompts_for(learned.class_word or "", learned.module.family, is_style):
        found.append(learned.prompt(template))
        if not learned.is_in(found[-1]):
            raise UserError(f"--prompts: {template!r} lacks the subject; put {{}} or {learned.token} where it goes.")
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        UserError: no such file, not text, or nothing in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
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
    templates: Any = "style" if learned.module.adapter.is_style else "object"
    crop: Any = said.get("crop") or "center"
    data = SubjectData(path, class_word=learned.class_word, templates=templates, crop=crop)
    try:
        data.setup("test")
    except UserError as error:  # what the setting is called here
        raise UserError(str(error).replace("data.path", "--data")) from error
    return data


def _as_trained_on(data: SubjectData) -> list[Image.Image]:
    """The photos, whole between bars where they were trained on so: encoders would take the central square."""
    from mep_lightning.photos import square

    if data.crop != "letterbox":
        return list(data.photos)
    return [square(photo, max(photo.size), data.crop) for photo in data.photos]


def _name(checkpoint: object) -> str:
    """How metrics.json names an encoder: a hub id as it is, a folder by its last part."""
    text = str(checkpoint)
    return Path(text).name if Path(text).is_dir() else text
