"""The tensors of a single file under the names of diffusers' layout, by its own converters, which see no weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from mep_lightning.bases.single_file import CUT, SingleFile, read_header
from mep_lightning.bases.weights import read, takes
from mep_lightning.errors import UserError


@dataclass(frozen=True)
class Stored:
    """Stands for a tensor in a file, and remembers what a converter makes of it.

    Attributes:
        key: its name in the file.
        shown: of its shape, on the meta device.
        steps: what is made of it, one after the other.
    """

    key: str
    shown: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def taken_from(self, tensor: Tensor) -> Tensor:
        """What the converter made of it, of the tensor itself."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor

    def _then(self, step: Callable[[Tensor], Tensor]) -> Stored:
        return Stored(self.key, step(self.shown), (*self.steps, step))

    @property
    def shape(self) -> torch.Size:
        return self.shown.shape

    @property
    def ndim(self) -> int:
        return self.shown.ndim

    @property
    def T(self) -> Stored:
        return self._then(lambda tensor: tensor.T)

    def __getitem__(self, index: Any) -> Stored:
        return self._then(lambda tensor: tensor[index])

    def contiguous(self) -> Stored:
        return self._then(lambda tensor: tensor.contiguous())

    def clone(self) -> Stored:
        return self

    def detach(self) -> Stored:
        return self


def converted(file: SingleFile, module: nn.Module, part: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part that a module has places for, one at a time, as `weights.stored` gives those of a folder.

    Args:
        file: that holds them.
        module: what they are for.
        part: as diffusers names its folder: "unet", "vae", "text_encoder" or "text_encoder_2".

    Raises:
        UserError: the file lacks some, or is damaged.
    """
    made_of = defaultdict(list)
    for name, stand_in in names(file, module, part).items():
        if not takes(module, name):
            continue
        made_of[stand_in.key].append((name, stand_in))
    for key, tensor in read(file.path, made_of.__contains__):
        for name, stand_in in made_of[key]:
            yield name, stand_in.taken_from(tensor)


def names(file: SingleFile, module: nn.Module, part: str) -> dict[str, Stored]:
    """Each name in diffusers' layout, and what its tensor is made of."""
    prefix = file.prefixes[part]
    shapes = {key: shape for key, shape in read_header(file.path)[0].items() if key.startswith(prefix)}
    held = {key: Stored(key, torch.empty(shape, device="meta")) for key, shape in shapes.items()}
    try:
        found = _convert(held, file, module, part)
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{file.path} lacks {error} of its {part}: {CUT}") from None
    made = {name: stand_in for name, stand_in in found.items() if stand_in is not None}
    return {name: each for name, each in made.items() if not name.endswith("position_ids")}  # some hold broken ones


def _convert(held: dict[str, Stored], file: SingleFile, module: Any, part: str) -> dict[str, Any]:
    if part == "unet":
        return convert_ldm_unet_checkpoint(held, module.config)
    if part == "vae":
        return convert_ldm_vae_checkpoint(held, module.config)
    if file.is_open_clip(part):
        return convert_open_clip_checkpoint(module, held, prefix=file.prefixes[part])
    return convert_ldm_clip_checkpoint(held)
