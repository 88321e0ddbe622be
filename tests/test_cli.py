"""The `mep` command itself: help, unknown commands, and the system's errors as sentences."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mep_lightning
from mep_lightning.cli import main, sentence_about

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mep_lightning.__file__).parents[1])}


@pytest.mark.parametrize(
    "words", [["--help"], ["fit", "--help"], ["test", "--help"], ["predict", "--help"], ["doctor", "-h"]]
)
def test_help_answers_at_once_and_without_torch(words):
    code = (
        "import sys\nfrom mep_lightning.cli import main\n"
        f"try: main({words})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert time.monotonic() - started < 3
    assert "usage: mep" in result.stdout


def test_help_names_every_command_and_recipe(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("fit", "test", "predict", "doctor"))
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("quickstart", "zoodip", "textual_inversion", "models/sd15", "--resume"))


def test_help_all_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help-all"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{key}" in shown for key in ("model.lr", "data.class_word", "trainer.max_steps", "samples.every"))


@pytest.mark.parametrize(
    ("word", "mend"), [("fti", "did you mean fit?"), ("xyzzy", "there are fit, test, predict, compare, plan, doctor.")]
)
def test_an_unknown_command(word, mend, capsys):
    assert main([word]) == 2
    assert mend in capsys.readouterr().err


SYSTEM_ERRORS = {
    "no right to write": (
        PermissionError(errno.EACCES, "Permission denied", "r/.tmp-7-config.yaml"),
        ("r cannot be used (Permission denied); change its rights or give another one.", 2),
    ),
    "a file in the way": (
        FileExistsError(errno.EEXIST, "File exists", "notes.txt"),
        ("notes.txt cannot be used (File exists); give another path.", 2),
    ),
    "a path through a file": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "notes.txt/r"),
        ("notes.txt/r cannot be used (Not a directory); give another path.", 2),
    ),
    "a disk that is read only": (
        OSError(errno.EROFS, "Read-only file system", b"/mnt/r"),
        ("/mnt/r cannot be used (Read-only file system); give another path.", 2),
    ),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "r/.tmp-7-a.png"),
        ("r: the disk is full; make room and try again.", 1),
    ),
}


@pytest.mark.parametrize("name", SYSTEM_ERRORS)
def test_what_the_system_refuses_is_a_sentence_that_names_the_users_path(name):
    error, expected = SYSTEM_ERRORS[name]
    assert sentence_about(error, "predict") == expected


@pytest.mark.parametrize("runs_out", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)])
def test_memory_that_runs_out_is_a_sentence(runs_out):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        runs_out()
    sentence, status = sentence_about(raised.value, "fit")
    assert sentence.startswith("out of memory; try --model.precision int8") and status == 1


@pytest.mark.parametrize("command", ["test", "predict", "compare"])
def test_what_takes_less_memory_is_asked_for_by_options_that_the_command_has(command, capsys):
    sentence, _ = sentence_about(torch.OutOfMemoryError("of a GPU"), command)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    named = re.findall(r"(?<!')--[a-z-]+", sentence)  # what stands in quotes is for `mep fit`
    assert named and set(named) <= set(known)


def test_a_command_without_such_options_says_so():
    assert sentence_about(MemoryError(), "plan") == ("out of memory; end other programs and try again.", 1)


@pytest.mark.parametrize("error", [KeyError("a"), OSError("of a library, about no path"), ValueError("b")])
def test_what_only_a_traceback_explains_is_no_sentence(error):
    assert sentence_about(error, "fit") is None
