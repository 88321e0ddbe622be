"""Bases of the right sizes without their weights: what planning and measuring need, and nothing that can draw.

`architectures/` holds the configuration files of the public bases; a folder of one's own works as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mep_lightning.bases.base import Base
from mep_lightning.bases.families import TINY_FOLDER, describe, locate
from mep_lightning.bases.load import QUANTIZED, activation_dtype, build, exact_device
from mep_lightning.bases.weights import Tensors, fill_, read_part
from mep_lightning.phases import phase
from mep_lightning.quantization import QuantizedWeight, quantize_module_

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
    folder, device = architecture(name), exact_device(device)
    info = describe(folder, name)
    dtype = activation_dtype(precision, device, info.family)
    make = make or (lambda _, shape: torch.empty(shape, dtype=STORED))
    with phase("load"):
        unet, text_encoder = build(folder)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read_part(AutoencoderKL.load_config, folder / "vae"))
        for module, part in ((unet, "unet"), (text_encoder, "text_encoder"), (vae, "vae")):
            if precision in QUANTIZED and part != "vae":
                quantize_module_(module, precision)
            fill_(module, made_up(module, make), folder / part, dtype, device)
            module.eval().requires_grad_(False)
        return Base(
            name=str(name),
            folder=folder,
            info=info,
            precision=precision,
            dtype=dtype,
            device=device,
            unet=unet,
            text_encoders=[text_encoder],
            tokenizers=[tokenizer(text_encoder.config.max_position_embeddings)],
            vae=vae,
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
            scaling_factor=float(vae.config.scaling_factor),
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
