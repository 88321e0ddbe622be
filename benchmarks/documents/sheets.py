"""Small pictures in a table, for people to judge: methods beside one another, and precisions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.photos import find_photos
from mep_lightning.tiny.subjects import Style, style, subject
from mep_lightning.tiny.world import CLASSES

if TYPE_CHECKING:
    from mep_lightning.commands.learned import Learned

PICTURES = Path(__file__).parents[2] / "docs" / "images"
SIDE, GAP, HEAD, FONT = 64, 2, 14, 10
"""Pixels: of a picture's side, between two, of the line above them, and of its letters."""
PROMPT = "in the snow"
"""How the prompt ends that methods are shown with: the first of such."""
ONE, PLACES = "car-0", (0, 3, 6, 8, 14, 19)
"""The subject that is shown with several prompts, and which of `tiny`'s twenty."""
LABELS = {"hollowed_net": "hollowed", "textual_inversion": "TI", "zoodip_fast": "zoodip fast"}
"""Names that are longer than a picture is wide."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
LEARNED_IN = ("int8", "int4")
SEEDS = 6

Line = Sequence[Image.Image | None]


def save(path: Path, titles: Sequence[str], lines: Sequence[Line], of: Sequence[str] = ()) -> None:
    """Write lines of pictures with a title over each column; a picture that is missing stays white.

    Args:
        path: of the sheet, a PNG file.
        titles: of the columns.
        lines: None is a missing picture.
        of: what each column is of, kept in the file: a picture that is missing stays as a sheet that had the same
            column, and as many lines, had it.
    """
    step = SIDE + GAP
    sheet = Image.new("RGB", (len(titles) * step - GAP, HEAD + len(lines) * step - GAP), "white")
    for column, before in enumerate(_columns(path, of)):
        if before is not None and before.height == sheet.height:
            sheet.paste(before, (column * step, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, sheet.width, HEAD - 1), "white")
    for column, title in enumerate(titles):
        is_wide = pen.textlength(title, font_size=FONT) > step
        at, anchor = (column * step, "la") if is_wide else (column * step + SIDE / 2, "ma")
        pen.text((at, 1), title, "black", anchor=anchor, font_size=FONT)
    for number, line in enumerate(lines):
        for column, picture in enumerate(line):
            if picture is not None:
                sheet.paste(picture.convert("RGB").resize((SIDE, SIDE)), (column * step, HEAD + number * step))
    path.parent.mkdir(parents=True, exist_ok=True)
    about = PngInfo()
    about.add_text("of", json.dumps(list(of)))
    sheet.save(path, optimize=True, pnginfo=about if of else None)


def _columns(path: Path, of: Sequence[str]) -> list[Image.Image | None]:
    """Of a sheet that is there, the columns of the same things."""
    if not of or not path.is_file():
        return []
    with Image.open(path) as before:
        had, pictures = json.loads(before.info.get("of", "[]")), before.convert("RGB")
    left = {key: column * (SIDE + GAP) for column, key in enumerate(had)}
    return [pictures.crop((left[key], 0, left[key] + SIDE, pictures.height)) if key in left else None for key in of]


def methods(folder: Path, keys: Mapping[str, str], path: Path = PICTURES / "compare_pictures.png") -> None:
    """A picture of one prompt by every method of a comparison, a line a subject, its first photo ahead.

    Args:
        folder: of the comparison.
        keys: method -> what its pictures were made with; those of the same whose runs are gone stay on the sheet.
        path: of the sheet.
    """
    comparison = ComparisonFolder(folder)
    lines = []
    for photos in sorted(comparison.photos.iterdir()):
        drawn = [_drawn(comparison.run(name, photos.name, 0)) for name in keys]
        lines.append([find_photos(photos)[0].read(SIDE), *(pictures[0] if pictures else None for pictures in drawn)])
    save(path, ["photo", *(LABELS.get(name, name) for name in keys)], lines, ["photo", *keys.values()])


def diversity(
    folder: Path, keys: Mapping[str, str], seeds: int, images: int, path: Path = PICTURES / "compare_diversity.png"
) -> None:
    """All that the runs of the first subject drew of one prompt: a column a method, lines by seed (Figure S3)."""
    comparison = ComparisonFolder(folder)
    first = min(photos.name for photos in comparison.photos.iterdir())
    lines = []
    for seed in range(seeds):
        drawn = [_drawn(comparison.run(name, first, seed)) for name in keys]
        lines += [[pictures[i] if i < len(pictures) else None for pictures in drawn] for i in range(images)]
    save(path, [LABELS.get(name, name) for name in keys], lines, list(keys.values()))


def prompts(folder: Path, keys: Mapping[str, str], path: Path = PICTURES / "compare_prompts.png") -> None:
    """What every method drew of one subject for several prompts, a line each; one of its photos ahead (Figures S6, S7).

    Args:
        folder, keys, path: as for `methods`.
    """
    comparison = ComparisonFolder(folder)
    photos = find_photos(comparison.photos / ONE)
    drawn = [list(_by_prompt(comparison.run(name, ONE, 0)).values()) for name in keys]
    lines = [
        [
            photos[number % len(photos)].read(SIDE),
            *(of_prompts[place][0] if place < len(of_prompts) else None for of_prompts in drawn),
        ]
        for number, place in enumerate(PLACES)
    ]
    save(path, ["photo", *(LABELS.get(name, name) for name in keys)], lines, ["photo", *keys.values()])


def precisions(path: Path = PICTURES / "precisions.png", caption: str = "a photo of a house") -> None:
    """What the embedded base draws of a caption in every precision: a column each, a line a seed (Figure S1)."""
    from mep_lightning import defaults, load_base
    from mep_lightning.evaluation import generate

    values = defaults.lookup("zoodip", "tiny", "fp32")
    steps, guidance = values["sampling_steps"], values["guidance"]
    drawn = [
        generate(load_base("tiny", precision), [caption] * SEEDS, list(range(SEEDS)), steps=steps, guidance=guidance)
        for precision in PRECISIONS
    ]
    save(path, PRECISIONS, list(zip(*drawn, strict=True)))


def styles(folder: Path, path: Path = PICTURES / "styles.png", count: int = 3) -> None:
    """Pictures in a style, then that style on objects that its pictures did not show: a line a style (Figure 6).

    Runs of `zoodip_style` are kept in the folder, and not trained again.
    """
    lines = []
    for index in range(count):
        one = style(index)
        shown = [one.scenes.kind == kind for kind in range(len(CLASSES))]
        others = [kind for kind, found in zip(CLASSES, shown, strict=True) if not found.any()]
        drawn = _in_style(one, folder / one.name, [f"a {{}} {kind} on grass" for kind in others])
        lines.append([*one.photos(), None, *drawn])
    width = max(map(len, lines))
    titles = ["pictures in the style", *[""] * (width - 1)]
    titles[len(style(0).photos()) + 1] = "the style on other objects"
    save(path, titles, lines)


def learned(folder: Path, path: Path = PICTURES / "learned_precisions.png", count: int = 3) -> None:
    """Subjects as ZOODiP's tokens draw them that were learned on int8 and on int4 weights: a line each (Figure S2).

    Runs of `zoodip_fast` are kept in the folder, and not trained again.
    """
    lines = []
    for index in range(count):
        who = subject(index)
        photos = folder / who.name / "photos"
        _save(who.photos(), photos)
        lines.append([who.photos()[0]])
        for precision in LEARNED_IN:
            words = ["--config", "zoodip_fast", "--model.precision", precision, "--data.path", str(photos)]
            token = _trained(folder / who.name / precision, [*words, "--data.class_word", who.class_word])
            lines[-1] += _drawn_of(token, ["a photo of a {}", f"a {{}} {PROMPT}"])
    save(path, ["photo", *(title for precision in LEARNED_IN for title in (precision, ""))], lines)


def _in_style(one: Style, folder: Path, templates: Sequence[str]) -> list[Image.Image]:
    """What a token that was trained on a style draws."""
    pictures = folder / "pictures"
    _save(one.photos(), pictures)
    for i, caption in enumerate(one.captions):
        (pictures / f"{i}.txt").write_text(caption)
    return _drawn_of(_trained(folder / "run", ["--config", "zoodip_style", "--data.path", str(pictures)]), templates)


def _save(pictures: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")


def _trained(run: Path, words: Sequence[str]) -> Learned:
    """What a run learns that these words begin, or has learned already."""
    from mep_lightning import open_learned
    from mep_lightning.cli import main

    status = main(["fit", "--run", str(run), *(["--resume"] if run.is_dir() else words)])
    if status:
        raise SystemExit(status)
    return open_learned(run)


def _drawn_of(token: Learned, templates: Sequence[str]) -> list[Image.Image]:
    """A picture of each prompt."""
    from mep_lightning import defaults
    from mep_lightning.evaluation import generate

    prompts = [token.prompt(template) for template in templates]
    token.load(prompts)
    values = defaults.lookup("zoodip", "tiny", token.module.precision)
    steps, guidance = values["sampling_steps"], values["guidance"]
    return generate(token.module, prompts, [0] * len(prompts), steps=steps, guidance=guidance)


def _drawn(run: Path) -> list[Image.Image]:
    """What a run drew of the prompt that methods are shown with."""
    return next((pictures for prompt, pictures in _by_prompt(run).items() if prompt.endswith(PROMPT)), [])


def _by_prompt(run: Path) -> dict[str, list[Image.Image]]:
    """What a run drew of each prompt, in their order."""
    found: dict[str, list[Image.Image]] = {}
    for picture in sorted((run / "evaluation").glob("*-seed*.png")):
        with Image.open(picture) as opened:
            found.setdefault(str(opened.info.get("prompt", "")), []).append(opened.copy())
    return found
