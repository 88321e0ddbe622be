"""`mep doctor`: what is installed, which devices there are, which kernels are active and why not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mep_lightning.commands.options import Options

NEEDED = ("torch", "lightning", "diffusers", "transformers", "safetensors", "jsonargparse", "torchmetrics", "pillow")
OPTIONAL = {
    "bitsandbytes": "--model.precision int4",
    "cma": "gf_ti",
    "ray": "mep compare --engine ray",
    "triton": "the kernels on a GPU",
    "tensorboard": "--trainer.logger TensorBoardLogger --trainer.logger.save_dir DIR",
    "wandb": "--trainer.logger WandbLogger",
}
"""Package -> what it is good for here."""


def run(argv: Sequence[str]) -> int:
    """Runs `mep doctor`; status 1 says that something needed is missing."""
    Options("doctor", "Shows versions, devices and which kernels are active.").parse_args(list(argv))
    from mep_lightning.commands.chatter import quiet_after_imports

    quiet_after_imports()
    missing = [name for name in NEEDED if installed(name) is None]
    sections = {
        "versions": versions(),
        "optional packages": optional(),
        **({} if "torch" in missing else {"devices": devices(), "kernels": active_kernels()}),
        "embedded base": embedded_base(),
    }
    found = {title: list(lines) for title, lines in sections.items()}
    width = 2 + max(len(name) for lines in found.values() for name, _ in lines)
    for title, lines in found.items():
        print(title)
        for name, what in lines:
            print(f"  {name:<{width}}{what}")
    if missing:
        print(f"mep doctor: {', '.join(missing)} is missing; install it with pip.", file=sys.stderr)
    return 1 if missing else 0


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> Iterator[tuple[str, str]]:
    """The package itself, Python, and what it needs."""
    yield "mep-lightning", installed("mep-lightning") or "not installed (running from a checkout)"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in NEEDED:
        yield name, installed(name) or "missing"


def optional() -> Iterator[tuple[str, str]]:
    """What is there beyond the needed, and what is lost without it."""
    for name, purpose in OPTIONAL.items():
        yield name, installed(name) or f"not installed; for {purpose}"


def devices() -> Iterator[tuple[str, str]]:
    """The CPU with its memory, and every GPU."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield (
        "cpu",
        f"{torch.get_num_threads()} of {os.cpu_count()} threads, {gib(memory.available)} of {gib(memory.total)} free",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        yield f"cuda:{index}", f"{properties.name}, capability {capability}, {gib(free)} of {gib(total)} free"
    if torch.cuda.device_count() == 0:
        yield "cuda", f"none: {why_no_cuda()}"
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{gib(disk.free)} free in {Path.cwd()}"


def why_no_cuda() -> str:
    """Why torch sees no GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built for the CPU alone"
    return f"torch was built for CUDA {torch.version.cuda}, but finds no device or driver"


def active_kernels() -> Iterator[tuple[str, str]]:
    """Which implementation answers for each operation here."""
    from mep_lightning import kernels
    from mep_lightning.kernels.status import status

    yield from status([name for name in kernels.__all__ if hasattr(getattr(kernels, name), "reference")])


def embedded_base() -> Iterator[tuple[str, str]]:
    """Whether the weights came along."""
    from mep_lightning.tiny import BASE, CLIP, DINO

    for name, folder in (("tiny", BASE), ("its CLIP", CLIP), ("its DINO", DINO)):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        there = any(folder.rglob("*.safetensors"))
        yield name, f"{size / 2**20:.1f} MiB" if there else f"no weights in {folder}; reinstall mep-lightning"


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB"
