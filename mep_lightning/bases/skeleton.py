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

from mep_lightning.bases.base import Base, BaseFolder
from mep_lightning.bases.families import ARCHITECTURES, TINY_FOLDER, describe, locate
from mep_lightning.bases.load import activation_dtype, assemble, exact_device
from mep_lightning.bases.weights import Half, Tensors, build_vae, vae_dtype
from mep_lightning.quantization import QuantizedWeight

Maker = Callable[[str, tuple[int, ...]], Tensor]
"""Makes up a tensor of a name and a shape."""


def packaged() -> list[str]:
    """The names of the public bases whose configuration files are here."""
    return sorted(path.name for path in ARCHITECTURES.iterdir() if path.is_dir())


def unwritten(_: str, shape: tuple[int, ...]) -> Tensor:
    """Memory of what the public bases' files hold, fp16, that nobody has written to."""
    return torch.empty(shape, dtype=torch.float16)


def architecture(name: str | Path) -> Path:
    """The folder that describes a base: the packaged `sd15`, `sd21` or `sdxl`, or what `load_base` takes.

    Raises:
        UserError: nothing describes it.
    """
    return ARCHITECTURES / str(name) if str(name) in packaged() else locate(name, weights=False)


def skeleton(
    name: str | Path,
    precision: str,
    device: str | torch.device = "cpu",
    make: Maker = unwritten,
    *,
    dtype: torch.dtype | None = None,
    vae: bool = True,
) -> Base:
    """A base with made-up weights, loaded just as `load_base` loads real ones.

    Args:
        name: as for `architecture`.
        precision: as for `load_base`.
        device: where to.
        make: makes up what a file would hold; by default `unwritten`.
        dtype: what activations are computed in; by default what they are on the device.
        vae: as for `load_base`.
    """
    folder = architecture(name)
    info = describe(folder, name)
    device = exact_device(device)
    found = BaseFolder(
        name=str(name),
        folder=folder,
        info=info,
        precision=precision,
        dtype=dtype or activation_dtype(precision, device, info.family),
        device=device,
    )
    return assemble(
        found,
        tensors=lambda module, _: made_up(module, make),
        tokenizer=tokenizer,
        vae=(lambda: skeleton_vae(found, make)) if vae else None,
    )


def skeleton_vae(found: BaseFolder, make: Maker, half: Half | None = None) -> AutoencoderKL:
    """An autoencoder, or half of it, with made-up weights, where and in what a base is wanted."""
    dtype, folder = vae_dtype(found.folder, found.dtype), found.folder / "vae"
    return build_vae(folder, lambda module: made_up(module, make), folder, found.device, dtype, half)


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


def tokenizer(_: str, length: int) -> CLIPTokenizer:
    """A tokenizer for bases whose own is not there: that of `tiny`, padding to as many tokens as the encoder reads."""
    made = CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")
    made.model_max_length = length
    return made
