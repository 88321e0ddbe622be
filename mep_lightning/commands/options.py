"""Command-line options whose mistakes are answered with one sentence, without torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from mep_lightning.commands.recipes import nearest
from mep_lightning.errors import UserError


class Options(argparse.ArgumentParser):
    """An argument parser that raises `UserError` instead of printing a page of usage."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"mep {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(self._sentence(message))

    def _sentence(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            return unknown_arguments(unknown[1].split(), self._option_string_actions)
        if missing := re.match(r"the following arguments are required: (.*)", message):
            return f"{missing[1]} is missing; see `{self.prog} --help`."
        if wrong := re.match(r"argument (\S+?)(?:/\S+)?: (.*)", message):
            return f"{wrong[1]}: {wrong[2]}; see `{self.prog} --help`."
        return f"{message}; see `{self.prog} --help`."


def unknown_arguments(words: list[str], known: Iterable[str]) -> str:
    """The sentence about arguments that nothing takes, with the nearest option that exists.

    Args:
        words: what was not understood, values included.
        known: the option strings there are.
    """
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        options = sorted(name for name in known if name.startswith("--") and name != "--help")
        mend = f"put an option such as {options[0]} before it" if options else "leave it out"
        return f"{words[0]!r} stands alone; {mend}."
    option = option.split("=")[0].rstrip("+")
    names = {name.rstrip("+") for name in known}
    guess = nearest(option, names)
    return f"there is no option {option}; " + (f"did you mean {guess}?" if guess else "see --help.")
