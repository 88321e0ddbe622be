"""Which family a base belongs to, told from its few JSON files: no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mep_lightning.bases.single_file import SingleFile, is_single_file, open_file
from mep_lightning.errors import UserError

TINY_FOLDER = Path(__file__).parent.parent / "tiny" / "weights" / "base"
ARCHITECTURES = Path(__file__).parent / "architectures"
"""Configuration files of the public bases."""
VARIANTS = ["*.fp16.*", "*.non_ema.*", "*.ema.*", "safety_checker/*"]
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
"""The second of each is SDXL's."""


@dataclass(frozen=True)
class Family:
    """What must be known of a base before it is loaded.

    Attributes:
        family: "tiny", "sd1", "sd2" or "sdxl".
        resolution: its native side in pixels.
        vae_factor: pixels a latent.
        prediction: "epsilon" or "v_prediction".
    """

    family: str
    resolution: int
    vae_factor: int
    prediction: str


def locate(name: str | Path, *, weights: bool = True) -> Path:
    """The folder that describes a base: `tiny`, a local one in diffusers' layout, a hub id's (fetched into the hub's
    cache), or the packaged one that a single file has the architecture of.

    Args:
        name: what the user calls the base; a hub id may end in `@` and a revision.
        weights: False fetches only the JSON files of a hub id.

    Raises:
        UserError: nothing is there, or the folder lacks a part.
    """
    if is_single_file(name):
        return ARCHITECTURES / open_file(name).architecture
    if str(name) == "tiny":
        folder = TINY_FOLDER
        hint = "reinstall mep-lightning, its weights did not come along"
    elif Path(name).expanduser().is_dir():
        folder, hint = Path(name).expanduser(), "give a folder that diffusers' save_pretrained wrote"
    elif Path(name).is_file() or not _may_be_on_hub(str(name)):
        if (ARCHITECTURES / str(name)).is_dir():
            raise UserError(
                f"base {str(name)!r} is an architecture without weights, which only `mep plan` takes: give a folder, a "
                ".safetensors file, a hub id such as owner/name, or the recipe of one, such as --config models/sd15"
            )
        raise UserError(
            f"base {str(name)!r} is no folder: give an existing one, a .safetensors file, a hub id such as owner/name, "
            "or tiny"
        )
    else:
        folder, hint = _download(str(name), weights=weights), "choose a repository in diffusers' layout"
    wanted = ("model_index.json", *PARTS, *((TEXT_ENCODERS[1], TOKENIZERS[1]) if is_sdxl(folder) else ()))
    missing = [part for part in wanted if not (folder / part).exists()]
    if missing:
        raise UserError(f"base {str(name)!r} lacks {', '.join(missing)} in {folder}: {hint}")
    return folder


def _may_be_on_hub(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith((".", "~")) and _split(name)[0].count("/") == 1


def _split(name: str) -> tuple[str, str | None]:
    """A hub id, and the branch, tag or commit behind its `@`."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _download(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = _split(name)

    files = ["unet/diffusion_pytorch_model*", "vae/diffusion_pytorch_model*", "text_encoder*/model*"]
    patterns = ["*.json", "*.txt"] + ([f"{file}.safetensors" for file in files] if weights else [])
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=VARIANTS))
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        raise UserError(
            f"base {name!r} is neither a folder here nor to be had from the hub ({type(error).__name__}): "
            "check the name and the network, or give a local folder or .safetensors file"
        ) from error


def identify(name: str | Path) -> Family:
    """Read a base's family, resolution and prediction type from its configuration files."""
    return describe(locate(name, weights=False), name)


def describe(folder: Path, name: str | Path) -> Family:
    """As `identify`, of a base's folder; its name is for messages, and says where a single file corrects the folder."""
    index, unet, vae, scheduler = (
        _read(folder / part)
        for part in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    width = unet.get("cross_attention_dim", 0)
    if _names_sdxl(index):
        family = "sdxl"
    else:
        family = {128: "tiny", 768: "sd1", 1024: "sd2"}.get(width, "")
    if not family:
        raise UserError(f"base {str(name)!r} is of no known family (cross_attention_dim {width} in unet/config.json)")
    if unet.get("in_channels", 4) != 4:
        raise UserError(
            f"base {str(name)!r} takes {unet['in_channels']} channels, as inpainting models do: use a text-to-image one"
        )
    for part, config, key, kind in (("vae", vae, "block_out_channels", list), ("unet", unet, "sample_size", int)):
        if not isinstance(config.get(key), kind):
            raise UserError(f"{folder / part}/config.json has no {key}: fetch the base again")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    prediction = scheduler.get("prediction_type", "epsilon")
    info = Family(family, unet["sample_size"] * factor, factor, prediction)
    return _corrected(info, open_file(name), width) if is_single_file(name) else info


def _corrected(info: Family, file: SingleFile, width: int) -> Family:
    """What is known of a single file whose architecture is described."""
    if file.width != width:
        raise UserError(
            f"base {str(file.path)!r} is of no known family: its U-Net attends to {file.width} dimensions of text, and "
            f"{file.architecture}'s to {width}"
        )
    prediction = file.schedule.get("prediction_type", info.prediction)
    return replace(info, prediction=prediction, resolution=file.side or info.resolution)


def is_sdxl(folder: Path) -> bool:
    """Whether a base's folder holds an SDXL model, with a second text encoder."""
    index = folder / "model_index.json"
    return index.exists() and _names_sdxl(_read(index))


def _names_sdxl(index: dict) -> bool:
    return "XL" in index.get("_class_name", "")


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"the base lacks {path}: give a complete folder in diffusers' layout") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the base again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: fetch the base again")
    return content
