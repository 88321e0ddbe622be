"""The networks that score pictures: any CLIP and any DINO checkpoint, with preprocessing in Pillow and torch alone.

Shapes: N pictures or texts, D embedding, H W picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mep_lightning.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
DEFAULT_DINO = "facebook/dino-vits16"


def default_encoders(family: str | None = None) -> tuple[str, str]:
    """The CLIP and DINO checkpoints that a base is scored with: the embedded ones for `tiny`, the papers' otherwise."""
    if family == "tiny":
        import mep_lightning.tiny as tiny

        weights = Path(tiny.__file__).parent / "weights"
        return str(weights / "clip"), str(weights / "dino")
    return DEFAULT_CLIP, DEFAULT_DINO


@dataclass(frozen=True)
class Preprocessing:
    """A checkpoint's picture preprocessing: resize, centre crop, rescale, normalise.

    Args:
        size: (height, width) to resize to, or one number for the shortest edge, or None.
        crop: (height, width) of the centre crop, zero-padded where the picture is smaller, or None.
        resample: Pillow's number of the filter.
        rescale: what pixel values 0..255 are multiplied with.
        mean: subtracted, a number a channel.
        std: divided by, a number a channel.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_checkpoint(cls, name: str, image_size: int, clip: bool) -> Preprocessing:
        """Read `preprocessor_config.json`; without one, what CLIP (or DINO) was trained with, at the model's size."""
        config = _preprocessor_config(name)
        if config is None:
            if clip:
                return cls(size=image_size, crop=(image_size, image_size))
            return cls(
                (image_size, image_size), None, int(Image.Resampling.BILINEAR), 1 / 255, IMAGENET_MEAN, IMAGENET_STD
            )
        normalize = config.get("do_normalize", True)
        return cls(
            size=_resize_target(config.get("size", image_size), clip) if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", image_size)) if config.get("do_center_crop", clip) else None,
            resample=int(config.get("resample", Image.Resampling.BICUBIC if clip else Image.Resampling.BILINEAR)),
            rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config.get("image_mean", CLIP_MEAN if clip else IMAGENET_MEAN)) if normalize else (0.0,) * 3,
            std=tuple(config.get("image_std", CLIP_STD if clip else IMAGENET_STD)) if normalize else (1.0,) * 3,
        )

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode to one tensor [N, 3, H, W], fp32."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        if self.size is not None:
            image = image.resize(self._resized(image.size), Image.Resampling(self.resample))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)  # [3, H, W]
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (pixels * self.rescale - mean) / std

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after resizing a picture of this (width, height)."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        assert self.size is not None
        width, height = size
        if width <= height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size


class ClipEncoder(nn.Module):
    """Unit-length CLIP embeddings of pictures and texts.

    Args:
        checkpoint: a hub id, or a folder written by `save_pretrained` (model, tokenizer, perhaps a preprocessor).
        batch_size: how many pictures or texts go through at once.
    """

    def __init__(self, checkpoint: str | Path = DEFAULT_CLIP, batch_size: int = 16) -> None:
        super().__init__()
        name = str(checkpoint)
        self.model: Any = _load_model(name, "CLIP")
        if not hasattr(self.model, "get_text_features"):
            raise UserError(f"{name} holds a {type(self.model).__name__}, not a CLIP model: name a CLIP checkpoint.")
        self.tokenizer: Any = _load_tokenizer(name)
        self.preprocess = Preprocessing.from_checkpoint(name, self.model.config.vision_config.image_size, clip=True)
        self.context = int(getattr(self.model.config.text_config, "max_position_embeddings", 77))
        self.batch_size = batch_size

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to [N, D], fp32, each of length 1."""
        return _in_batches(
            images, self.batch_size, lambda part: self.model.get_image_features(self.preprocess(part).to(_device(self)))
        )

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to [N, D], fp32, each of length 1; what exceeds the model's context is cut off."""

        def embed(part: Sequence[str]) -> Any:
            # Padded to the full context, as SigLIP's and CLIP's were in training.
            tokens = self.tokenizer(
                list(part), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
            )
            return self.model.get_text_features(**tokens.to(_device(self)))

        return _in_batches(texts, self.batch_size, embed)


class DinoEncoder(nn.Module):
    """Unit-length DINO embeddings: the class token of the last layer, as DreamBooth's DINO score takes it.

    Args:
        checkpoint: a hub id or a `save_pretrained` folder of a DINO or DINOv2 vision transformer.
        batch_size: how many pictures go through at once.
    """

    def __init__(self, checkpoint: str | Path = DEFAULT_DINO, batch_size: int = 16) -> None:
        super().__init__()
        name = str(checkpoint)
        self.model: Any = _load_model(name, "DINO")
        if hasattr(self.model, "get_text_features") or not hasattr(self.model.config, "image_size"):
            raise UserError(
                f"{name} holds a {type(self.model).__name__}, not a DINO model: name a DINO (ViT) checkpoint."
            )
        self.preprocess = Preprocessing.from_checkpoint(name, self.model.config.image_size, clip=False)
        self.batch_size = batch_size

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to [N, D], fp32, each of length 1."""
        return _in_batches(
            images,
            self.batch_size,
            lambda part: self.model(pixel_values=self.preprocess(part).to(_device(self))).last_hidden_state[:, 0],
        )


def _in_batches(items: Sequence[Any], batch_size: int, embed: Any) -> Tensor:
    """Embeddings of all items, [N, D], normalised."""
    parts = []
    for start in range(0, len(items), batch_size):
        features = embed(items[start : start + batch_size])
        # transformers 5 wraps the projected features in an output; earlier versions return the tensor.
        features = features if isinstance(features, Tensor) else features.pooler_output
        parts.append(F.normalize(features.float(), dim=-1))
    if not parts:
        raise UserError("There is nothing to score: the list of pictures or texts is empty.")
    return torch.cat(parts)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _load_model(name: str, kind: str) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name)
            # DINO's checkpoints have no pooler; ViTModel would make one up from random numbers.
            options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
            model = AutoModel.from_pretrained(name, config=config, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"Cannot load the {kind} checkpoint '{name}' ({_first_line(error)}); name a hub id that can be reached or"
            " a folder holding config.json and model.safetensors."
        ) from error
    return model.float().eval().requires_grad_(False)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The CLIP checkpoint '{name}' has no tokenizer ({_first_line(error)}); save it there with"
            " tokenizer.save_pretrained."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading reports and bars: an encoder is a tool here, not what the user asked for."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _preprocessor_config(name: str) -> Mapping[str, Any] | None:
    """The picture half of a checkpoint's processor files, whichever of the two names it has."""
    from transformers.utils import cached_file

    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is None:
            continue
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore or delete it.") from error
        config = config.get("image_processor", config)
        if "image_mean" in config or "size" in config:
            return config
    return None


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size written as a number or as a mapping."""
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"])) if "height" in size else (int(size["shortest_edge"]),) * 2
    return int(size), int(size)


def _resize_target(size: Any, clip: bool) -> tuple[int, int] | int:
    """What `size` means: CLIP reads a bare number as the shortest edge, the vision transformers as a square."""
    if isinstance(size, Mapping):
        return int(size["shortest_edge"]) if "shortest_edge" in size else _pair(size)
    return int(size) if clip else _pair(size)


def _center_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of [3, H, W] at (height, width), zeros where the picture is smaller."""
    height, width = size
    pad_h, pad_w = max(height - pixels.shape[1], 0), max(width - pixels.shape[2], 0)
    if pad_h or pad_w:
        pixels = F.pad(pixels, (-(-pad_w // 2), pad_w // 2, -(-pad_h // 2), pad_h // 2))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]
