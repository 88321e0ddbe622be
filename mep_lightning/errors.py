"""The exceptions that users see as a sentence."""

import re


class UserError(ValueError):
    """Wrong input: one sentence that names the file or key and the mend. The command line prints it and exits 2."""


class TooLargeError(UserError):
    """A run that memory would not suffice for, told before anything is loaded."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is answered as Ctrl-C is: what was trained is saved first."""


class CheckpointError(UserError):
    """A checkpoint that training cannot go on from. The message does not name the file: who opened it knows it."""


SEEDS = 2**63
"""How many seeds there are: what torch takes, with room above for one seed a picture."""


def refuse_unless(fine: bool, name: str, value: object, mend: str) -> None:
    """Raise a `UserError` that says what `name` is and what to use, unless it is fine."""
    if not fine:
        raise UserError(f"{name} is {value}; use {mend}.")


LONGEST = 200
"""Characters of what a library says."""


def reason(error: BaseException) -> str:
    """What a library's exception says, in a short line: its first, or its name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:LONGEST] if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, or the host's, which torch tells as a RuntimeError."""
    of_host = isinstance(error, RuntimeError) and re.search("can't allocate memory|not enough memory", str(error))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or bool(of_host)


def counted(count: int, one: str) -> str:
    """How many, in words: 1 step, 2 steps."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def human(size: float) -> str:
    """Bytes for people: 812 MiB, 2.37 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:  # else three digits would be four
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.2f} GiB"
