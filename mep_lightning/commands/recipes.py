"""Finds and reads the YAML recipes that `--config` names, without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import mep_lightning
from mep_lightning.errors import UserError, reason
from mep_lightning.reading import load_yaml, read_text

SECTIONS = {"model", "data", "trainer", "checkpoint", "samples", "memory", "export"}


def recipes_folder() -> Path:
    """The folder of the packaged recipes: inside the package when installed, beside it in a source checkout."""
    package = Path(mep_lightning.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """The names that `--config` takes, such as `zoodip` and `models/sd15`."""
    folder = recipes_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(names, key=lambda name: (name.count("/"), name))


def find_recipe(name: str) -> Path:
    """The file of a path or a packaged name.

    Raises:
        UserError: neither is there; the message lists the packaged names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = recipes_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if name in recipe_names() or packaged.is_file():
        return packaged
    known = recipe_names()
    guess = f" Did you mean {near}?" if (near := nearest(name, known)) else ""
    raise UserError(
        f"--config {name}: neither a file nor a packaged recipe.{guess} Give a path to a YAML file or one of: "
        f"{', '.join(known)}."
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UserError: unreadable, or not a mapping of settings; the message names the file and the line.
    """
    try:
        content = load_yaml(read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML ({error.problem or error.context}); correct it there.") from None
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, yaml.reader.ReaderError) as error:
        why = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise UserError(f"{path}: cannot be read as YAML ({why}); give another file to --config.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as settings ({reason(error)}); correct it there.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not settings; write lines such as `model: {{...}}`.")
    for section in SECTIONS & content.keys():
        if not isinstance(content[section], dict):
            raise UserError(f"{path}: {section} is {content[section]!r}, not settings; write `{section}: {{...}}`.")
    return content


def mentions(recipe: dict[str, Any], key: str) -> bool:
    """Whether a recipe sets `key` (dotted); `init_args` may be left out and lists are searched."""
    return _mentions(recipe, [part for part in key.split(".") if part != "init_args"])


def _mentions(node: Any, parts: list[str]) -> bool:
    if not parts:
        return True
    if isinstance(node, list):
        return any(_mentions(item, parts) for item in node)
    if not isinstance(node, dict):
        return False
    here = [value for name, value in node.items() if str(name).rstrip("+") == parts[0]]
    return any(_mentions(value, parts[1:]) for value in here) or _mentions(node.get("init_args"), parts)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or the only one that holds it; None where none is near."""
    by_lower = {name.lower(): name for name in known}
    holding = [name for name in by_lower if word.lower() in name]
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6) or (holding if len(holding) == 1 else [])
    return by_lower[found[0]] if found else None
