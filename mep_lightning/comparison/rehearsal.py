"""One step on the embedded base, ahead of a process's first cell: what libraries load is not that cell's memory."""

from __future__ import annotations

import functools
import io
from contextlib import redirect_stderr, redirect_stdout
from tempfile import TemporaryDirectory

from mep_lightning.errors import reason

WORDS = [
    *("--config", "textual_inversion", "--model.base", "tiny", "--trainer.accelerator", "cpu", "--no-plan"),
    *("--trainer.max_steps", "1", "--samples.count", "1", "--samples.steps", "1"),
]


@functools.cache
def rehearse() -> None:
    """Train a token for a step and draw a picture; what is left of it is what libraries load, some 60 MiB.

    Where memory is measured by how much a process grows, its first cell would be charged with them, the next ones not.
    What single methods need besides (peft, bitsandbytes) still counts for the first of theirs: a few MiB. A GPU's own
    counters see tensors alone, so that nothing is done where there is one.

    Raises:
        KeyboardInterrupt: by a signal.
    """
    import torch

    if torch.cuda.is_available():
        return
    from mep_lightning.commands import fit

    unheard = io.StringIO()
    try:
        with TemporaryDirectory() as folder, redirect_stdout(unheard), redirect_stderr(unheard):
            signalled = fit.run(["--run", f"{folder}/run", *WORDS])
    except Exception as error:  # no cell is lost by it
        print(f"Libraries' memory counts as this cell's: no step on tiny ahead of it ({reason(error)}).")
        return
    if signalled:
        raise KeyboardInterrupt
