"""Small text files that people or runs have written: settings, captions, figures; nothing of torch is needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mep_lightning.errors import UserError, human

LARGEST_LOG = 2**28
"""Bytes of a log: millions of steps."""
LARGEST = 4 * 2**20
"""Bytes of a file that is read whole: a thousand times what one takes, and no memory to speak of."""
NODES, DEPTH = 100_000, 100
"""How many values settings may hold, with every alias written out, and how deep they may lie."""


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """A text file's content.

    Raises:
        UserError: larger than any such file is, or a folder, a device or a pipe, which may never end.
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise UserError(f"{path} is no plain file: replace it")
    if size > LARGEST:
        raise UserError(f"{path} has {human(size)}, and no file of its kind has more than {human(LARGEST)}: replace it")
    return path.read_text(encoding=encoding, errors=errors)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read, or is not whole."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError, MemoryError):  # a UserError is a ValueError
        return None


def load_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: it goes too deep, round in a circle, or grows too much when its aliases are written out.
        yaml.YAMLError: it is no YAML.
    """
    try:
        _measure(yaml.compose(text, yaml.SafeLoader), {}, 0)
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("its settings lie too deep") from None
    except (IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:  # of a tag's constructor
        raise ValueError(f"a tag does not fit its value ({type(error).__name__})") from None


def _measure(node: Any, known: dict[int, int | None], depth: int) -> int:
    """How many values a node holds, with every alias written out; `known` has None for those that are being counted."""
    if node is None:
        return 0
    if id(node) in known:
        if (size := known[id(node)]) is None:
            raise ValueError("an alias holds itself")
        return size
    if depth > DEPTH:
        raise ValueError("its settings lie too deep")
    known[id(node)] = None
    children = getattr(node, "value", None)
    size = 1
    for child in children if isinstance(children, list) else ():
        for part in child if isinstance(child, tuple) else (child,):
            size += _measure(part, known, depth + 1)
            if size > NODES:
                raise ValueError("it grows too large when its aliases are written out")
    known[id(node)] = size
    return size
