"""Keeps libraries quiet on the command line, where their hints bury what the user has to see."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "peft",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
    "torchvision",
    "transformers",
)


def debugging() -> bool:
    """Whether the user asked for every message and traceback (`MEP_DEBUG=1`)."""
    return os.environ.get("MEP_DEBUG", "") not in ("", "0")


def quiet_before_imports() -> None:
    """Sets what libraries read while they are imported; costs nothing and imports none."""
    if debugging():
        return
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_after_imports() -> None:
    """Silences what only an imported library can silence: log levels set at import, and bars over local files."""
    if debugging():
        return
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or name.split(".")[0] not in LIBRARIES:
            continue
        if 0 < logger.level < logging.ERROR:  # one without a level takes its library's
            logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    for name in ("transformers", "diffusers"):
        if name in sys.modules:
            library = __import__(f"{name}.utils.logging", fromlist=["logging"])
            library.set_verbosity_error()
            library.disable_progress_bar()
    warnings.showwarning = _note


def _note(message: Warning | str, *_: object, **__: object) -> None:
    """What is left to warn of concerns the user, whom a file and a line of our code would not help.

    It goes where results go: what stands on stderr is why a command failed.
    """
    print(f"Note: {message}", flush=True)
