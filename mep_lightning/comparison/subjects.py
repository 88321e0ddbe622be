"""The subjects of a comparison: a folder of folders, as the public sets have them, or those of the tiny world."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mep_lightning.errors import UserError
from mep_lightning.photos import SUFFIXES

CLASSES, CONCEPTS = "prompts_and_classes.txt", "dataset.json"
"""Where DreamBooth's set and CustomConcept101 say what their subjects are."""


@dataclass(frozen=True)
class Subject:
    """Who is to be learned.

    Attributes:
        name: of its folder.
        class_word: what it is.
        photos: the folder.
    """

    name: str
    class_word: str
    photos: Path


def found_in(root: Path) -> list[Subject]:
    """A subject for every folder of photos in `root`, or in its folder `dataset`; hidden ones are none.

    What it is comes from `prompts_and_classes.txt` (DreamBooth's set) or `dataset.json` (CustomConcept101) in `root`,
    or else from the folder's name: "dog2" is a dog, "grey_sloth_plushie" a grey sloth plushie.

    Raises:
        UserError: there is no such folder, or no photos in any.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: there is no such folder; give one that holds a folder a subject.")
    known = _dreambooth(root) | _custom_concepts(root)
    folders = _folders_of_photos(root)
    if not folders and (root / "dataset").is_dir():
        known |= _dreambooth(root / "dataset")
        folders = _folders_of_photos(root / "dataset")
    subjects = [Subject(path.name, known.get(path.name) or _plain(path.name), path) for path in folders]
    if not subjects:
        raise UserError(f"--data {root}: no folder in it holds photos; give one that holds a folder a subject.")
    return subjects


def chosen(subjects: Sequence[Subject], names: Sequence[str]) -> list[Subject]:
    """Those that are named, in the order given.

    Raises:
        UserError: one is not there, and the message lists those that are; one is named twice, or none is.
    """
    by_name = {subject.name: subject for subject in subjects}
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(f"--only {unknown[0]}: there is no such subject; choose from {', '.join(by_name)}.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"--only {twice[0]}: it is named twice; name it once.")
    if not names:
        raise UserError(f"--only names none; choose from {', '.join(by_name)}.")
    return [by_name[name] for name in names]


def embedded(count: int, folder: Path) -> list[Subject]:
    """The first so many of the tiny world's 30, whose photos `photograph` puts below `folder`.

    Raises:
        UserError: there are not so many.
    """
    from mep_lightning.tiny.subjects import COUNTS, subject

    if not 1 <= count <= COUNTS["test"]:
        raise UserError(f"--subjects {count}: the tiny world has 1 to {COUNTS['test']}.")
    found = map(subject, range(count))
    return [Subject(who.name, who.class_word, folder / who.name) for who in found]


def photograph(subjects: Sequence[Subject]) -> None:
    """Write the photos of the tiny world's first subjects that are not there yet."""
    from mep_lightning.run_folder import replacing
    from mep_lightning.tiny.subjects import subject

    for index, one in enumerate(subjects):
        for number, photo in enumerate(subject(index).photos()):
            path = one.photos / f"{number}.png"
            if not path.exists():
                with replacing(path) as temporary:
                    photo.save(temporary, format="PNG")


def _folders_of_photos(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and _is_seen(path) and _has_photos(path)]


def _has_photos(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES and _is_seen(path) for path in folder.iterdir())


def _is_seen(path: Path) -> bool:
    return not path.name.startswith(".")


def _dreambooth(root: Path) -> dict[str, str]:
    """`subject_name,class` lines."""
    path = root / CLASSES
    if not path.is_file():
        return {}
    pairs = re.findall(
        r"^\s*([\w .-]*\w)\s*,\s*([\w ]+?)\s*$", path.read_text(encoding="utf-8", errors="replace"), re.M
    )
    return {name: word for name, word in pairs if name != "subject_name"}


def _custom_concepts(root: Path) -> dict[str, str]:
    """A list of concepts, each with its folder and class."""
    path = root / CONCEPTS
    try:
        concepts: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return {Path(one["instance_data_dir"]).name: str(one["class_prompt"]) for one in concepts}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a list of instance_data_dir and class_prompt ({error}); correct it.") from None


def _plain(name: str) -> str:
    return re.sub(r"[\d_\s-]+", " ", name).strip() or "object"
