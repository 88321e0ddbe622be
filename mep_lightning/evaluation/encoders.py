"""The networks that score pictures: any CLIP and any DINO checkpoint, with transformers' preprocessing over Pillow.

Shapes: N pictures or texts, D embedding, H W picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mep_lightning.errors import UserError
from mep_lightning.photos import central_square

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
DEFAULT_DINO = "facebook/dino-vits16"
CLIP_FILES = "config.json, model.safetensors, preprocessor_config.json and the tokenizer"
DINO_FILES = "config.json, model.safetensors and preprocessor_config.json"


def default_encoders(family: str | None = None) -> tuple[str, str]:
    """The CLIP and DINO checkpoints that score a base: the embedded ones for `tiny`, DreamBooth's otherwise."""
    if family == "tiny":
        from mep_lightning import tiny

        return str(tiny.CLIP), str(tiny.DINO)
    return DEFAULT_CLIP, DEFAULT_DINO


class _Encoder(nn.Module, ABC):
    """Unit-length embeddings of pictures, prepared as the checkpoint's own `preprocessor_config.json` says."""

    model: Any
    processor: Any

    def __init__(self, checkpoint: str | Path, batch_size: int) -> None:
        super().__init__()
        self.name, self.batch_size = str(checkpoint), batch_size

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode to one tensor [N, 3, H, W], fp32, on the model's device.

        Of one that is not square it is the central square, as training sees it: CLIP's processor cuts it out itself,
        DINO's would squash the picture. Who trained on whole photos between bars (`crop letterbox`) gives them so.
        """
        pixels = [image.convert("RGB") for image in images]
        if not self.processor.size.get("shortest_edge"):
            pixels = [central_square(image) for image in pixels]
        tensors = self.processor(pixels, return_tensors="pt", input_data_format="channels_last")
        return tensors.pixel_values.to(self.model.device)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to [N, D], fp32, each of length 1."""
        return self._in_batches(images, lambda part: self._features(self.preprocess(part)))

    @abstractmethod
    def _features(self, pixels: Tensor) -> Any:
        """Embeddings [N, D] of prepared pictures [N, 3, H, W]."""

    def _in_batches(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Any]) -> Tensor:
        """Embeddings of all items, [N, D], normalised."""
        if not len(items):
            raise UserError("There is nothing to score: the list of pictures or texts is empty.")
        parts = [embed(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)]
        # transformers 5 wraps the projected features in an output; earlier versions return the tensor.
        features = [part if isinstance(part, Tensor) else part.pooler_output for part in parts]
        return F.normalize(torch.cat(features).float(), dim=-1)


class ClipEncoder(_Encoder):
    """Unit-length CLIP embeddings of pictures and texts.

    Args:
        checkpoint: a hub id, or a folder in transformers' layout (model, tokenizer and image processor).
        batch_size: how many pictures or texts go through at once.
    """

    def __init__(self, checkpoint: str | Path = DEFAULT_CLIP, batch_size: int = 16) -> None:
        super().__init__(checkpoint, batch_size)
        self.model = _load_model(self.name, "CLIP", CLIP_FILES)
        if not hasattr(self.model, "get_text_features"):
            raise UserError(
                f"{self.name} holds a {type(self.model).__name__}, not a CLIP model: name a CLIP checkpoint."
            )
        self.tokenizer = _load("AutoTokenizer", self.name, "CLIP", CLIP_FILES)
        self.processor = _load_processor(self.name, "CLIP", CLIP_FILES)
        self.context = int(getattr(self.model.config.text_config, "max_position_embeddings", 77))

    def _features(self, pixels: Tensor) -> Any:
        return self.model.get_image_features(pixels)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to [N, D], fp32, each of length 1; what exceeds the model's context is cut off."""

        def embed(part: Sequence[str]) -> Any:
            # Padded to the full context, as SigLIP's and CLIP's were in training.
            tokens = self.tokenizer(
                list(part), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
            )
            return self.model.get_text_features(**tokens.to(self.model.device))

        return self._in_batches(texts, embed)


class DinoEncoder(_Encoder):
    """Unit-length DINO embeddings: the class token of the last layer, as DreamBooth's DINO score takes it.

    Args:
        checkpoint: a hub id, or a folder in transformers' layout, of a DINO or DINOv2 vision transformer.
        batch_size: how many pictures go through at once.
    """

    def __init__(self, checkpoint: str | Path = DEFAULT_DINO, batch_size: int = 16) -> None:
        super().__init__(checkpoint, batch_size)
        self.model = _load_model(self.name, "DINO", DINO_FILES)
        if hasattr(self.model, "get_text_features") or not hasattr(self.model.config, "image_size"):
            raise UserError(
                f"{self.name} holds a {type(self.model).__name__}, not a DINO model: name a DINO (ViT) checkpoint."
            )
        self.processor = _load_processor(self.name, "DINO", DINO_FILES)

    def _features(self, pixels: Tensor) -> Any:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def _load_model(name: str, kind: str, files: str) -> Any:
    config = _load("AutoConfig", name, kind, files)
    # DINO's checkpoints have no pooler; ViTModel would make one up from random numbers.
    options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    model = _load("AutoModel", name, kind, files, config=config, use_safetensors=True, **options)
    return model.float().eval().requires_grad_(False)


def _load_processor(name: str, kind: str, files: str) -> Any:
    # Pillow's, so that scores do not depend on whether torchvision is there: it resamples otherwise.
    return _load("AutoImageProcessor", name, kind, files, backend="pil")


def _load(auto_class: str, name: str, kind: str, files: str, **options: Any) -> Any:
    """A part of a checkpoint, by one of transformers' Auto classes; or the sentence that says what is wrong."""
    import transformers

    try:
        with _quiet():
            return getattr(transformers, auto_class).from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Cannot load the {kind} checkpoint '{name}' ({lines[0].rstrip('.')}); name a hub id that can be reached or"
            f" a folder holding {files}."
        ) from error


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
