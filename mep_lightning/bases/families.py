"""Which family a base belongs to, told from its few JSON files: no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mep_lightning.bases.single_file import FAMILIES, SingleFile, is_single_file, open_file, other_channels
from mep_lightning.errors import UserError

TINY_FOLDER = Path(__file__).parent.parent / "tiny" / "weights" / "base"
ARCHITECTURES = Path(__file__).parent / "architectures"
"""Configuration files of the public bases."""
WEIGHTS = (
    "unet/diffusion_pytorch_model*",
    "vae/diffusion_pytorch_model*",
    "text_encoder/model*",
    "text_encoder_2/model*",
)
"""What a hub repository's weights are called, up to their ending."""
HALF, VARIANTS = ["*.fp16.*", "*.fp16-*"], ["*.non_ema[.-]*", "*.ema[.-]*", "safety_checker/*"]
"""What is not fetched of one: the first only where a part has nothing else, the rest never."""
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
"""The second of each is SDXL's."""
PREDICTIONS = ("epsilon", "v_prediction")
OTHER_PROCESSES = ("EDM", "FlowMatch")
"""What the names of schedulers begin with whose noise is not added as these families' is."""
TOLD_MORE = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
"""Settings of U-Nets that must be told of classes or pictures."""


@dataclass(frozen=True)
class Family:
    """What must be known of a base before it is loaded.

    Attributes:
        family: "tiny", "sd1", "sd2" or "sdxl".
        resolution: its native side in pixels.
        vae_factor: pixels a latent.
        prediction: "epsilon" or "v_prediction".
        force_zeros: whether SDXL's guidance starts from zeros, and not from what an empty prompt means.
    """

    family: str
    resolution: int
    vae_factor: int
    prediction: str
    force_zeros: bool = True


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
                ".safetensors file or a hub id such as owner/name (`mep fit --config models/sd15` names SD1.5's)"
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
    """A hub id's snapshot in the hub's cache; of a part that has no plain safetensors, those in fp16."""
    from huggingface_hub import snapshot_download

    repository, revision = _split(name)
    wanted = ["*.json", "*.txt"] + ([f"{files}.safetensors" for files in WEIGHTS] if weights else [])
    ignored = [*HALF, *VARIANTS]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
        parts = [files for files in WEIGHTS if weights and (folder / files).parent.is_dir()]
        if lacking := [files for files in parts if not _stored(folder, files, ignored)]:
            wanted = [f"{files}.fp16*{ending}" for files in lacking for ending in ("safetensors", "json")]
            # By the commit, which the folder is named after: a branch may have moved on.
            snapshot_download(repository, revision=folder.name, allow_patterns=wanted, ignore_patterns=VARIANTS)
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        raise UserError(
            f"base {name!r} is neither a folder here nor to be had from the hub ({type(error).__name__}): "
            "check the name and the network, or give a local folder or .safetensors file"
        ) from error
    if missing := [files.split("/")[0] for files in lacking if not _stored(folder, files, VARIANTS)]:
        raise UserError(
            f"base {name!r} has no safetensors of its {', '.join(missing)} in {folder}: choose a repository or "
            "revision with some, or connect to the hub where they were not fetched yet"
        )
    return folder


def _stored(folder: Path, files: str, ignored: list[str]) -> bool:
    """Whether a snapshot holds weights of that name, those left out that are ignored."""
    return any(not any(map(path.match, ignored)) for path in folder.glob(f"{files}.safetensors"))


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
    _refuse_other_kinds(name, unet, scheduler)
    for part, config, key, kind in (("vae", vae, "block_out_channels", list), ("unet", unet, "sample_size", int)):
        if not isinstance(config.get(key), kind):
            raise UserError(f"{folder / part}/config.json has no {key}: fetch the base again")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    prediction = scheduler.get("prediction_type", "epsilon")
    force_zeros = index.get("force_zeros_for_empty_prompt") is not False
    info = Family(family, unet["sample_size"] * factor, factor, prediction, force_zeros)
    return _corrected(info, open_file(name), width) if is_single_file(name) else info


def _refuse_other_kinds(name: str | Path, unet: dict, scheduler: dict) -> None:
    """Raise UserError of a base that looks like its family, but adds noise or is told what it draws in another way."""
    if unet.get("in_channels", 4) != 4:
        raise UserError(f"base {str(name)!r} {other_channels(unet['in_channels'])}")
    told = [key for key in TOLD_MORE if unet.get(key) is not None]
    told += ["addition_embed_type"] if unet.get("addition_embed_type") not in (None, "text_time") else []
    if told:
        raise UserError(
            f"base {str(name)!r} must be told more than a text ({told[0]} {unet[told[0]]!r} in unet/config.json): "
            "use a text-to-image one"
        )
    kind, where = str(scheduler.get("_class_name")), "in scheduler/scheduler_config.json"
    if kind.startswith(OTHER_PROCESSES):
        raise UserError(f"base {str(name)!r} has a noise schedule of its own ({kind} {where}): {FAMILIES}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(
            f"base {str(name)!r} predicts neither noise nor v (prediction_type {prediction!r} {where}): {FAMILIES}"
        )


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
