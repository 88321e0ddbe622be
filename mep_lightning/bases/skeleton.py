"""Bases of the right sizes without their weights: what planning and measuring need, and nothing that can draw.

`architectures/` holds the configuration files of the public bases; a folder of one's own works as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mep_lightning.bases.base import Base
from mep_lightning.bases.families import TINY_FOLDER, describe, locate
from mep_lightning.bases.load import assemble, exact_device
from mep_lightning.bases.weights import Tensors, fill_, read_part
from mep_lightning.quantization import QuantizedWeight

ARCHITECTURES = Path(__file__).parent / "architectures"
STORED = torch.float16
"""What the public bases' files hold."""

Maker = Callable[[str, tuple[int, ...]], Tensor]
"""Makes up a tensor of a name and a shape."""


def architecture(name: str | Path) -> Path:
    """The folder that describes a base: the packaged `sd15`, `sd21` or `sdxl`, or what `load_base` takes.

    Raises:
        UserError: nothing describes it.
    """
    packaged = ARCHITECTURES / str(name)
    return packaged if str(name) and packaged.is_dir() else locate(name, weights=False)


def skeleton(name: str | Path, precision: str, device: str | torch.device = "cpu", make: Maker | None = None) -> Base:
    """A base with made-up weights, loaded just as `load_base` loads real ones.

    Args:
        name: as for `architecture`.
        precision: as for `load_base`.
        device: where to.
        make: makes up what a file would hold; by default memory that nobody has written to.
    """
    folder = architecture(name)
    make = make or (lambda _, shape: torch.empty(shape, dtype=STORED))

    def vae(device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        with torch.device("meta"):
            module = AutoencoderKL.from_config(read_part(AutoencoderKL.load_config, folder / "vae"))
        fill_(module, made_up(module, make), folder / "vae", dtype, device)
        return module.eval().requires_grad_(False)

    return assemble(
        name,
        folder,
        describe(folder, name),
        precision,
        exact_device(device),
        tensors=lambda module, _: made_up(module, make),
        vae=vae,
        tokenizer=tokenizer,
    )


def made_up(module: nn.Module, make: Maker) -> Tensors:
    """Every tensor that a file of this module's weights would hold, in floating point, one at a time."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for prefix, part in module.named_modules():
            packed = part.packed if isinstance(part, QuantizedWeight) else ()
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            shapes = {key: value.shape for key, value in own if value.is_floating_point() and key not in packed}
            if isinstance(part, QuantizedWeight):
                shapes["weight"] = part.weight_shape
            for key, shape in shapes.items():
                name = f"{prefix}.{key}".lstrip(".")
                yield name, make(name, tuple(shape))

    return tensors()


def tokenizer(length: int) -> CLIPTokenizer:
    """A tokenizer for bases whose own is not there: that of `tiny`, padding to as many tokens as the encoder reads."""
    made = CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")
    made.model_max_length = length
    return made
