"""A base in one safetensors file, named as its first publishers named it; told from its header alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mep_lightning.errors import UserError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS = {
    "sd15": ("cond_stage_model.transformer.",),
    "sd21": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
"""Packaged architecture -> what the names of its text encoders' tensors begin with; `model.` is open_clip's."""
REFINER = "conditioner.embedders.0.model."
READS_LATENTS, READS_TEXT = f"{UNET}input_blocks.0.0.weight", "attn2.to_k.weight"
OTHER_CHANNELS = {9: "inpainting models", 8: "InstructPix2Pix models", 7: "upscalers", 5: "depth models"}
LORA = ("lora_", "lora.", "hada_", "lokr_", "dora_scale")
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
STEPS_OF_SD2_BASE = 875000
"""`global_step` of the one SD2 file that diffusers knows to predict noise."""
SIDES = {("sd21", "epsilon"): 512}
"""px, where a base that predicts so is not as large as its packaged architecture."""

CUT = "it is no whole SD1, SD2 or SDXL, use one that nothing was cut from"
COMPLETE = "use a file with U-Net, autoencoder and text encoder in it, or a folder in diffusers' layout"
FAMILIES = "use a Stable Diffusion 1, 2 or XL model"


@dataclass(frozen=True)
class SingleFile:
    """What a file's header says of the base in it.

    Attributes:
        path: the file.
        architecture: the packaged one that it has.
        width: of the text that its U-Net attends to.
        schedule: settings of the noise schedule that are not its architecture's.
        is_guess: whether nothing says what it predicts, and its family has both kinds.
    """

    path: Path
    architecture: str
    width: int
    schedule: Mapping[str, Any] = field(default_factory=dict)
    is_guess: bool = False

    @property
    def prefixes(self) -> dict[str, str]:
        """Part, as diffusers names its folder -> what its tensors' names begin with."""
        texts = zip(("text_encoder", "text_encoder_2"), TEXTS[self.architecture], strict=False)
        return {"unet": UNET, "vae": VAE, **dict(texts)}

    def is_open_clip(self, part: str) -> bool:
        """Whether a text encoder is open_clip's, which pads with `!`."""
        return self.prefixes[part].endswith("model.")

    @property
    def side(self) -> int | None:
        """Its native resolution in pixels, where that is not its architecture's."""
        return SIDES.get((self.architecture, self.schedule.get("prediction_type", "")))


def is_single_file(name: str | Path) -> bool:
    """Whether a base's name is that of a file of weights, there or not."""
    path = Path(name).expanduser()
    return path.suffix.lower() in (".safetensors", *PICKLED) and not path.is_dir()


def open_file(name: str | Path) -> SingleFile:
    """Recognise a base by the names and shapes of its tensors.

    Raises:
        UserError: the file is not there, damaged or pickled, or holds no SD1, SD2 or SDXL base that is complete.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"base {str(name)!r} is no file: check the path")
    if path.suffix.lower() in PICKLED:
        raise UserError(
            f"base {str(name)!r} is pickled, and no pickle is executed here: take its publisher's .safetensors, or "
            "convert it by diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py with --to_safetensors"
        )
    shapes, said, trained_steps = read_header(path)
    if refusal := _refusal(shapes):
        raise UserError(f"base {str(name)!r} {refusal}")
    kinds = [kind for kind, prefixes in TEXTS.items() if any(_has(shapes, prefix) for prefix in prefixes)]
    if not kinds:
        raise UserError(f"base {str(name)!r} lacks its text encoder: {COMPLETE}")
    width = next((shape[-1] for key, shape in shapes.items() if key.endswith(READS_TEXT)), 0)
    prediction = _told(path, shapes, said)
    is_guess = prediction is None and kinds[0] == "sd21"
    if is_guess:
        prediction = "epsilon" if trained_steps == STEPS_OF_SD2_BASE else "v_prediction"
    schedule: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    schedule |= {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
    found = SingleFile(path, kinds[0], width, schedule, is_guess)
    if missing := [part for part, prefix in found.prefixes.items() if not _has(shapes, prefix)]:
        raise UserError(f"base {str(name)!r} lacks its {', '.join(missing)}: {COMPLETE}")
    return found


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], int | None]:
    """Each tensor's shape, the file's metadata, and for how many steps it says that it was trained."""
    try:
        with safe_open(path, "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            steps = int(file.get_tensor("global_step")) if shapes.get("global_step") == () else None
            return shapes, file.metadata() or {}, steps
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): fetch it again") from None


def _has(shapes: Mapping[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)


def _refusal(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why a file is no base to personalise, as the end of a sentence; nothing where it may be one."""
    if any(word in key for key in shapes for word in LORA):
        return "is a LoRA, not a base: give the base that it was trained on"
    if any(key.startswith("control_model.") for key in shapes):
        return "is a ControlNet, not a base: use a text-to-image one"
    if READS_LATENTS not in shapes:
        return _named_instead(shapes)
    if (channels := shapes[READS_LATENTS][1]) != 4:
        return other_channels(channels)
    if _has(shapes, REFINER) and not _has(shapes, TEXTS["sdxl"][1]):
        return "is SDXL's refiner, which draws on what a base began: use the base"
    if "edm_mean" in shapes:
        return f"has a noise schedule of its own (EDM), as Playground's do: {FAMILIES}"
    return ""


def other_channels(channels: int) -> str:
    """Why a U-Net that takes so many channels is none to personalise, as the end of a sentence."""
    like = f", as {OTHER_CHANNELS[channels]} do" if channels in OTHER_CHANNELS else ""
    return f"takes {channels} channels{like}: use a text-to-image one"


def _named_instead(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """As `_refusal`, of a file without such a U-Net."""
    if _has(shapes, "down_blocks.") or _has(shapes, "encoder.down_blocks.") or _has(shapes, "text_model."):
        return "is one part of a base in diffusers' layout: give the folder with model_index.json in it"
    if any(_has(shapes, prefix) for prefix in (VAE, "encoder.down.")) and not _has(shapes, UNET):
        return f"is an autoencoder without its U-Net: {COMPLETE}"
    if len(shapes) <= 4 and all(len(shape) <= 2 for shape in shapes.values()):
        return "is an embedding, not a base: give the base that it was trained on"
    kind = _kind_elsewhere(shapes)
    return f"is of no known family{f' (it looks like {kind})' if kind else ''}: {FAMILIES}"


def _kind_elsewhere(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What diffusers takes a file of these tensors for; nothing where that is its fallback."""
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = str(infer_diffusers_model_type({k: torch.empty(s, device="meta") for k, s in shapes.items()}))
    except Exception:  # it asks files of its own kinds for more than their names
        return ""
    return "" if kind == "v1" else kind


def _told(path: Path, shapes: Mapping[str, Any], said: Mapping[str, str]) -> str | None:
    """What a base predicts, where its settings beside it, its metadata or a mark in it say so."""
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        return _parameterization(beside)
    prediction = said.get("modelspec.prediction_type", "").lower()
    return PREDICTIONS.get(prediction, "v_prediction" if "v_pred" in shapes else None)


def _parameterization(path: Path) -> str | None:
    """What the original code's settings say is predicted: noise, where they are silent; None of another file's."""
    import yaml

    mend = "set model.params.parameterization to eps or v in it, or remove it"
    try:
        settings: Any = yaml.safe_load(path.read_text())
        for key in ("model", "params"):
            settings = settings.get(key) if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or "denoiser_config" in settings:  # SDXL's code says it otherwise
            return None
        return PREDICTIONS[settings.get("parameterization", "eps")]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{path} does not say what the base beside it predicts: {mend}") from None
