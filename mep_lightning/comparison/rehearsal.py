"""One step on the embedded base, ahead of a process's first cell: libraries' own memory is no cell's."""

from __future__ import annotations

import functools
import io
from contextlib import redirect_stderr, redirect_stdout, suppress
from tempfile import TemporaryDirectory

WORDS = [
    *("--config", "textual_inversion", "--model.base", "tiny", "--trainer.accelerator", "cpu", "--no-plan"),
    *("--trainer.max_steps", "1", "--samples.count", "1", "--samples.steps", "1"),
]


@functools.cache
def rehearse() -> None:
    """Go once through what a cell goes through, and keep nothing of it but what libraries load, some 60 MiB.

    Where memory is measured by how much a process grows, its first cell would be charged with them, the next ones not.
    A GPU's own counters see tensors alone: nothing is done there.

    Raises:
        KeyboardInterrupt: by a signal.
    """
    import torch

    if torch.cuda.is_available():
        return
    from mep_lightning.commands import fit

    signalled = 0
    unheard = io.StringIO()
    with TemporaryDirectory() as folder, redirect_stdout(unheard), redirect_stderr(unheard), suppress(Exception):
        signalled = fit.run(["--run", f"{folder}/run", *WORDS])  # what is wrong here, the cells tell
    if signalled:
        raise KeyboardInterrupt
