"""Condenses jsonargparse's errors, a page each, to the one sentence that names the key and the mend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mep_lightning.commands.options import unknown_arguments
from mep_lightning.commands.recipes import mentions, nearest
from mep_lightning.errors import UserError

PART = re.compile(r"given class_path '([\w.]+)'")
NEEDS = re.compile(r"given class_path '([\w.]+)':\s+the following arguments are required: (\w+(?:, \w+)*)")
KEY = re.compile(r'[Pp]arser key "([^"]+)":?\s*(.*)', re.DOTALL)
NOT_ACCEPTED = re.compile(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'(?: is not accepted)?")
TYPE_NAMES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}


OWN_OPTIONS = ("--run", "--resume", "--help", "--help-all")


@dataclass
class Sources:
    """Where settings came from, to name the file that holds a mistake.

    Attributes:
        recipes: the files read, with their settings.
        settings: the words of the command line, which win over the files.
    """

    recipes: Sequence[tuple[Path, dict[str, Any]]]
    settings: Sequence[str]

    def where(self, key: str) -> str:
        """How a sentence about a key begins: with the file to mend, or with nothing for the command line."""
        key = key.replace(".init_args.", ".")
        for word in self.settings:
            option = word.removeprefix("--").partition("=")[0].rstrip("+").replace(".init_args.", ".")
            if word.startswith("--") and (
                key == option or key.startswith(f"{option}.") or option.startswith(f"{key}.")
            ):
                return ""
        found = [path for path, recipe in self.recipes if mentions(recipe, key)]
        return f"{found[-1]}: " if found else ""  # the last file wins, as with settings


def sentence(message: str, parser: Any, sources: Sources) -> str:
    """What to tell the user about a parsing error.

    Args:
        message: jsonargparse's own.
        parser: the parser, asked for what it would have taken.
        sources: the files and words that were read.
    """
    known = sorted([*parser._option_string_actions, *OWN_OPTIONS])
    if unknown := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return unknown_arguments(unknown[1].split(), known)
    key_match = KEY.search(message)
    refused = NOT_ACCEPTED.search(message)
    if refused and not key_match:
        key = ".".join(part for part in refused.groups() if part)
        return _unknown_key(key, known, sources)
    if key_match is None:
        return f"{_first_line(message)}; see `mep fit --help`."
    key, rest = key_match[1], key_match[2]
    inner = list(KEY.finditer(rest))
    part = PART.search(rest)
    if refused and all(one[1] != refused[2] for one in inner):  # else a part takes it, and only its value is wrong
        return _unknown_argument(key, refused[2], part[1] if part else None, sources)
    if inner:  # a part's own argument, such as n of model.estimator
        key, rest = f"{key}.{inner[-1][1]}", inner[-1][2]
    elif missing := re.search(r"dot import path string: (\S+)", rest):
        return _unknown_part(key, missing[1], parser, sources)
    if needs := NEEDS.search(rest):
        return _missing_arguments(key, needs[1].rpartition(".")[2], needs[2].split(", "), sources)
    return _wrong_value(key, rest, sources)


def missing_package(error: ValueError, cause: ModuleNotFoundError | None) -> UserError | None:
    """What to tell the user about a part, such as a logger, whose package is not installed; None where it is not that.

    Args:
        error: jsonargparse's, which names the part, and what the part said.
        cause: the part's own; None where jsonargparse has kept nothing but its words.
    """
    part = re.search(rf"{PART.pattern}:?\s*(.*)", str(error))
    who = part[1].rpartition(".")[2] if part else "A part of this run"
    told = str(cause) if cause is not None else part[2] if part else ""
    if cause is None and not re.search("No module named|pip install", told):
        return None
    name = next((word for word in re.findall(r"['`]([\w.-]+)", told) if word != who), told)
    return UserError(f"{who} needs the package {name}, which is not installed; run: pip install {name}")


def _unknown_key(key: str, known: list[str], sources: Sources) -> str:
    names = {name.removeprefix("--").rstrip("+") for name in known}
    guess = nearest(key, {name for name in names if name.count(".") == key.count(".")})
    hint = f"did you mean {guess}?" if guess else "take it out."
    return f"{sources.where(key)}there is no setting {key}; {hint}"


def _unknown_argument(key: str, argument: str, class_path: str | None, sources: Sources) -> str:
    taken = _arguments_of(class_path)
    name = class_path.rpartition(".")[2] if class_path else "it"
    guess = nearest(argument, taken)
    mend = f"did you mean {guess}?" if guess else f"it takes {', '.join(taken)}." if taken else "it takes none."
    return f"{sources.where(f'{key}.{argument}')}{key}: {name} takes no {argument!r}; {mend}"


def _missing_arguments(key: str, name: str, arguments: list[str], sources: Sources) -> str:
    needs = f"{name} needs {' and '.join(arguments)}"
    if any(name in word for word in sources.settings):
        options = " ".join(f"--{key}.{argument} {argument.rpartition('_')[2].upper()}" for argument in arguments)
        return f"{needs}: add {options} behind it."  # further behind, it would be told to the next part of a list
    holding = Sources([(path, recipe) for path, recipe in sources.recipes if name in str(recipe)], [])
    return f"{holding.where(key)}{key}: {needs}; add it to its init_args."


def _unknown_part(key: str, name: str, parser: Any, sources: Sources) -> str:
    names = part_names(parser, key)
    guess = nearest(name, names)
    if guess:
        mend = f"did you mean {guess}?"
    elif 0 < len(names) <= 8:
        mend = f"choose one of {', '.join(names)}."
    else:
        mend = "give a class's name or its full path, such as lightning.pytorch.callbacks.Timer."
    return f"{sources.where(key)}{key}: there is no part named {name!r}; {mend}"


def _wrong_value(key: str, rest: str, sources: Sources) -> str:
    value = re.search(r"(?:Given value|Got value): (.*)", rest)
    expected = re.search(r"Subtypes: \[(.*)\]", rest) or re.search(r"Expected an? (.*?)\. Got value", rest)
    if value is None or expected is None:
        return f"{sources.where(key)}{key}: {_first_line(rest)}."
    return f"{sources.where(key)}{key} is {value[1].strip()!r}; it takes {readable_types(expected[1])}."


def readable_types(types: str) -> str:
    """Python's spelling of types, for people: "<class 'int'>, typing.Literal['auto']" -> "a whole number or auto"."""
    found = re.findall(r"<class '([\w.]+)'>|Literal\[([^\]]*)\]|(list|tuple|dict)\[", types)
    words: list[str] = []
    for name, literals, container in found:
        if name and (container_names := {"list", "tuple", "dict"} & {name}):
            container = container_names.pop()
        if literals:
            words += [literal.strip().strip("'\"") for literal in literals.split(",")]
        elif container:
            words.append({"list": "a list", "tuple": "a list", "dict": "a mapping"}[container])
        elif name:
            words.append(TYPE_NAMES.get(name, name.rpartition(".")[2]))
    words = [word for i, word in enumerate(words) if word != "null" and word not in words[:i]]
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def part_names(parser: Any, key: str) -> list[str]:
    """Short names of the classes that a key takes."""
    action = parser._option_string_actions.get(f"--{key}")
    names: list[str] = []
    for kind in _classes_in(getattr(action, "_typehint", None)):
        names += sorted(
            sub.__name__ for sub in {kind, *_subclasses(kind)} if not getattr(sub, "__abstractmethods__", None)
        )
    return names


def _classes_in(typehint: Any) -> list[type]:
    if isinstance(typehint, type) and typehint.__module__ != "builtins":
        return [typehint]
    return [kind for inner in getattr(typehint, "__args__", ()) for kind in _classes_in(inner)]


def _subclasses(kind: type) -> set[type]:
    found: set[type] = set()
    subclasses: list[type] = kind.__subclasses__()
    for sub in subclasses:
        found |= {sub, *_subclasses(sub)}
    return found


def _arguments_of(class_path: str | None) -> list[str]:
    if class_path is None:
        return []
    import importlib
    import inspect

    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return [name for name in parameters if name not in ("self", "args", "kwargs")]


def _first_line(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines()]
    return next((line for line in lines if line), "not understood").rstrip(".:")
