"""Reading weights tensor by tensor: a quantised model never exists in floats, and no file stays mapped in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mep_lightning.bases.families import is_sdxl
from mep_lightning.bases.frugal import compute_frugally_
from mep_lightning.bases.heap import Portions, give_back
from mep_lightning.bases.single_file import CUT
from mep_lightning.errors import UserError, reason
from mep_lightning.quantization import QuantizedWeight

Tensors = Iterable[tuple[str, Tensor]]
Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, ...] = ("encoder", "decoder")
OTHER_HALF: Mapping[Half, tuple[str, ...]] = {
    "encoder": ("decoder", "post_quant_conv"),
    "decoder": ("encoder", "quant_conv"),
}
"""What of an autoencoder is not needed with one half of it."""
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their files."""
OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of an autoencoder's attention, as files of SD1's days have them."""
TILE, LARGEST_TILE = 512, 768
"""px a side, the least and the most that an autoencoder sees at once."""


def fill_(
    module: nn.Module,
    tensors: Tensors,
    source: Path,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Give a module that was built on the meta device its weights, one tensor in flight at a time.

    Args:
        module: its quantised layers pack what they are given, everything else becomes `dtype`.
        tensors: the weights under their names, such as `stored(folder)`.
        source: the folder or single file that messages name.
        dtype: of norms, biases, embeddings and layers that are not quantised.
        device: where everything goes.
        memory_format: of convolutions' weights.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    portions = Portions()
    for key, tensor in tensors:
        portions.passes(tensor.nbytes)
        owner, name = _find(module, key)
        if owner is None:
            continue  # such as position_ids, which older files hold and newer models make
        if isinstance(owner, QuantizedWeight) and name == "weight":
            owner.quantize_(tensor, device)
            owner.weight = _formatted(owner.weight, memory_format)
            continue
        expected = getattr(owner, name)
        _refuse_misfit(key, tensor.shape, expected, source)
        value = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        value = _formatted(value, memory_format)
        if name in owner._parameters:
            setattr(owner, name, nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(name, value)
    give_back()
    _make_position_ids(module, device)
    _refuse_missing([name for name, value in _values(module) if value.is_meta], source)


def refuse_incomplete(module: nn.Module, shapes: Mapping[str, Sequence[int]], source: Path) -> None:
    """Raise UserError where what is stored does not fit a module on the meta device, or lacks a part of it."""
    there = set()
    for key, shape in shapes.items():
        owner, name = _find(module, key)
        if owner is not None:
            _refuse_misfit(key, shape, getattr(owner, name), source)
            there.add((id(owner), name))
    values = [
        (f"{path}.{name}", part, name)
        for path, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
    ]
    _refuse_missing([full for full, part, name in values if (id(part), name) not in there], source)


def _refuse_misfit(key: str, shape: Sequence[int], expected: Tensor, source: Path) -> None:
    if list(shape) != list(expected.shape):
        raise UserError(
            f"{key} in {source} is {list(shape)}, the model takes {list(expected.shape)}: {_misfit(source)}"
        )


def _refuse_missing(missing: list[str], source: Path) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        incomplete = "its weights are incomplete, fetch the base again" if source.is_dir() else _misfit(source)
        raise UserError(f"{source} lacks {missing[0]}{more}: {incomplete}")


def _misfit(source: Path) -> str:
    """What a tensor of another shape means, and the mend."""
    if source.is_dir():
        return "config.json and weights do not belong together, fetch the base again"
    return CUT


def _formatted(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    return value.contiguous(memory_format=memory_format) if value.dim() == 4 else value


def vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """What a base's autoencoder computes in where its U-Net does in `dtype`: SDXL's overflows fp16 and says so."""
    if dtype != torch.float16 or not is_sdxl(folder):
        return dtype
    upcast = read_part(AutoencoderKL.load_config, folder / "vae").get("force_upcast", True)
    return torch.float32 if upcast else dtype


def build_vae(
    folder: Path,
    tensors: Callable[[nn.Module], Tensors],
    source: Path,
    device: torch.device,
    dtype: torch.dtype,
    half: Half | None = None,
) -> AutoencoderKL:
    """The autoencoder that a folder describes, which stays in floats.

    Args:
        folder: holds its config.json.
        tensors: the weights of a module, such as `stored(folder)`.
        source: the folder or single file that messages name.
        device: where everything goes.
        dtype: of all of it; see `vae_dtype`.
        half: where one is enough, the other is not there.
    """
    module = described(AutoencoderKL, folder)
    for name in OTHER_HALF[half] if half else ():
        setattr(module, name, None)
    fill_(module, tensors(module), source, dtype, device, memory_format(device, dtype))
    return made_frugal(module.eval().requires_grad_(False))


def described(kind: type[Any], folder: Path) -> Any:
    """One of diffusers' models as a folder's config.json describes it, on the meta device."""
    with torch.device("meta"):
        return read_part(lambda path: kind.from_config(kind.load_config(path)), folder)


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Of convolutions' weights, which activations follow.

    Without channels last a CPU and a GPU's tensor cores copy what a convolution reads and what it writes; fp32 on a GPU
    is multiplied without them.
    """
    is_last = device.type == "cpu" or (device.type == "cuda" and dtype.itemsize == 2)
    return torch.channels_last if is_last else torch.contiguous_format


def made_frugal(vae: AutoencoderKL) -> AutoencoderKL:
    """Let an autoencoder compute frugally, and see pictures tile by tile that are larger than those it was trained on.

    Returns it. SDXL's sees its own 1024 px in tiles of 512: decoded whole in fp32, they would take 1.5 GiB of
    activations, not .4.
    """
    own = vae.config.sample_size
    tile = own if TILE < own <= LARGEST_TILE else TILE
    compute_frugally_(vae)
    vae.enable_tiling()
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae


def read_part(read: Callable[[Path], Any], folder: Path) -> Any:
    """What one of the libraries reads from a part's folder, or a sentence where it cannot."""
    try:
        return read(folder)
    except Exception as error:  # whatever a broken folder makes them raise, the mend is the same
        raise UserError(
            f"{folder} cannot be read ({reason(error)}): fetch the base again, with safetensors weights"
        ) from error


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _find(module: nn.Module, key: str) -> tuple[nn.Module | None, str]:
    """The submodule that a key of a file belongs to, and its name there, also under the names of other days."""
    newer = ".".join(OLDER_NAMES.get(word, word) for word in key.split("."))
    for candidate in (key, key.removeprefix("text_model."), f"text_model.{key}", newer):
        path, _, name = candidate.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(owner._parameters.get(name, owner._buffers.get(name)), Tensor):
            return owner, name
    return None, ""


def _make_position_ids(module: nn.Module, device: torch.device) -> None:
    """CLIP's position ids are no weights: they are made, not read."""
    for part in module.modules():
        ids = part._buffers.get("position_ids")
        if ids is not None and ids.is_meta:
            part._buffers["position_ids"] = torch.arange(ids.shape[-1], device=device).expand(ids.shape)


def takes(module: nn.Module, key: str) -> bool:
    """Whether a module has a place for the tensor of that name."""
    return _find(module, key)[0] is not None


def stored(folder: Path, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's safetensors, in one file or in shards, that a module has places for.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    for path in _files(folder):
        yield from read(path, partial(takes, module))


def stored_shapes(folder: Path) -> dict[str, Sequence[int]]:
    """Names and shapes of the tensors of a folder's safetensors."""
    found: dict[str, Sequence[int]] = {}
    for path in _files(folder):
        with safe_open(path, "pt") as tensors:
            found |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    return found


def read(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file under the keys that are wanted.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as tensors:
            keys = list(tensors.keys())
        for key in filter(wanted, keys):
            with safe_open(path, "pt") as tensors:  # opened anew, or the pages already read would stay mapped
                yield key, tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch the base again") from None


def _files(folder: Path) -> list[Path]:
    """The safetensors to read: the shards of an index, or the one plain file; where neither is there, a variant's.

    What the libraries name otherwise, such as a single-file copy beside, comes last.
    """
    endings = ("", ".index.json", ".index.*.json")  # the last is a variant's, as diffusers and transformers write it
    found = [path for ending in endings for path in folder.glob(f"*.safetensors{ending}")]
    if not found:
        raise UserError(f"{folder} holds no safetensors: fetch the base again with safetensors weights")
    first = min(found, key=_rank)
    if not _is_index(first):
        return [first]
    try:
        shards = set(json.loads(first.read_text())["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{first} has no weight_map: fetch the base again") from None
    return [folder / name for name in sorted(shards)]


def _is_index(path: Path) -> bool:
    return path.suffix == ".json"


def _rank(path: Path) -> tuple[bool, bool, bool, int, str]:
    """Of a file of weights or an index, the less the sooner it is read."""
    stem, *words = path.name.split(".")
    is_variant = not set(words) <= {"safetensors", "index", "json"}
    return (stem not in STEMS and not _is_index(path), is_variant, not _is_index(path), len(path.name), path.name)
