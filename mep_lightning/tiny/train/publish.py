"""Writes what training made as the folders that users load: a Stable-Diffusion-layout base and two metric encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mep_lightning.tiny.train.diffusion import build_scheduler
from mep_lightning.tiny.train.encoders import MEAN, STD
from mep_lightning.tiny.train.text import write_tokenizer

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _half(module: Any) -> Any:
    return module.to(torch.float16)


def publish_base(vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, to: Path) -> None:
    """The pipeline in diffusers' layout, fp16 safetensors."""
    (to / "model_index.json").parent.mkdir(parents=True, exist_ok=True)
    (to / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    _half(vae).save_pretrained(to / "vae")
    _half(unet).save_pretrained(to / "unet")
    _half(text_encoder).save_pretrained(to / "text_encoder")
    prefix_text_model(to / "text_encoder" / "model.safetensors")
    declare_fp32(to / "text_encoder" / "config.json")
    build_scheduler().save_pretrained(to / "scheduler")
    write_tokenizer(to / "tokenizer")


def prefix_text_model(path: Path) -> None:
    """Give a CLIP text encoder's keys the `text_model.` prefix that readers before transformers 5 want."""
    tensors = load_file(path)
    save_file(
        {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def declare_fp32(path: Path) -> None:
    """Let transformers load fp16 files as fp32 unless told otherwise, as diffusers does with the other parts."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2))


def publish_encoders(clip: CLIPModel, dino: ViTModel, tokenizer: CLIPTokenizer, to: Path) -> None:
    """CLIP and the DINO-like encoder in transformers' formats, with what an image processor must know."""
    side = {"height": 64, "width": 64}
    seen = {"size": side, "resample": 3, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}  # 3 is bicubic
    processors = {"clip": CLIPImageProcessorPil(crop_size=side, **seen), "dino": ViTImageProcessorPil(**seen)}
    for name, model in (("clip", clip), ("dino", dino)):
        _half(model).save_pretrained(to / name)
        declare_fp32(to / name / "config.json")
        processors[name].save_pretrained(to / name)
    tokenizer.save_pretrained(to / "clip")
