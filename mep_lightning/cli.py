"""The `mep` command: finds the verb and runs it. Imports no torch, so that help answers at once."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from mep_lightning.commands.chatter import debugging, quiet_before_imports
from mep_lightning.commands.recipes import nearest
from mep_lightning.errors import Terminated, UserError, is_out_of_memory
from mep_lightning.run_folder import TEMPORARY

COMMANDS = {
    "fit": "learn a subject from a folder of photos",
    "test": "generate the evaluation prompts and score them",
    "predict": "generate pictures of the learned subject",
    "compare": "train and score several methods on several subjects, in one table",
    "plan": "predict the peak memory of every method, before anything is loaded",
    "doctor": "show versions, devices and which kernels are active",
}

LESS_MEMORY = {
    "fit": "--model.precision int8, a lower --data.resolution or --data.batch_size 1",
    "compare": "--workers 1, or --fit '--model.precision int8'",
    **dict.fromkeys(("test", "predict"), "--precision int8, or --device cpu where a GPU is too small"),
}
"""Command -> its options that take less memory."""
LONGEST = 600
"""Characters of what is said about a mistake."""
HELP = f"""usage: mep COMMAND [options]

Teaches a text-to-image diffusion model a new subject or style from a few photos, in very little memory.

commands:
{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

first steps:
  mep fit --config quickstart                    embedded model and photos, a minute or two on a laptop
  mep fit --config zoodip --model.base ID_OR_DIR --data.path photos/ --data.class_word dog
  mep predict --run runs/zoodip-1 --prompts "a photo of a <sks> dog on a beach"

`mep COMMAND --help` explains a command. MEP_DEBUG=1 shows tracebacks and what libraries say.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0 done, 1 failed, 2 wrong input, 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"mep-lightning {version('mep-lightning')}")
        return 0
    command, rest = argv[0], argv[1:]
    quiet_before_imports()
    try:
        if command not in COMMANDS:
            guess = nearest(command, COMMANDS)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(COMMANDS)}."
            raise UserError(f"there is no command {command!r}; {hint}")
        return importlib.import_module(f"mep_lightning.commands.{command}").run(rest)
    except KeyboardInterrupt as signalled:
        return _say(command, "stopped.", 143 if isinstance(signalled, Terminated) else 130)
    except BrokenPipeError:  # the reader of our output went away, as `mep ... | head` does
        return 141
    except Exception as error:
        if debugging() or (told := sentence_about(error, command)) is None:
            raise
        return _say(command, *told)


def sentence_about(error: Exception, command: str) -> tuple[str, int] | None:
    """What to tell a user about an error, and the exit status; None where only a traceback helps."""
    kind = type(error).__name__
    if isinstance(error, UserError):
        return shortened(str(error)), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        again = "carry on with --resume" if command == "fit" else "try again"
        return f"{_place(error) or 'the run folder'}: the disk is full; make room and {again}.", 1
    if isinstance(error, OSError) and error.filename:  # the system's no to a path; libraries' own OSErrors name none
        mend = "change its rights or give another one" if isinstance(error, PermissionError) else "give another path"
        return f"{_place(error)} cannot be used ({error.strerror}); {mend}.", 2
    if is_out_of_memory(error):
        whose = "GPU memory" if kind == "OutOfMemoryError" else "memory"
        mend = f"try {LESS_MEMORY[command]}" if command in LESS_MEMORY else "end other programs and try again"
        return f"out of {whose}; {mend}.", 1
    if kind == "MisconfigurationException":  # Lightning's own word for wrong Trainer settings
        return f"wrong trainer setting: {error}", 2
    return None


def shortened(sentence: str) -> str:
    """A sentence in one line; of one that repeats a setting of any length, the beginning and the mend at its end."""
    sentence = " ".join(sentence.split())
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST // 2]} … {sentence[-LONGEST // 3 :]}"


def _place(error: OSError) -> str:
    """The path that an error is about; for a file that is only written to be renamed, its folder."""
    path = os.fsdecode(error.filename or "")
    folder, name = os.path.split(path)
    return folder or "." if name.startswith(TEMPORARY) else path


def _say(command: str, message: str, status: int) -> int:
    print(f"mep {command}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
