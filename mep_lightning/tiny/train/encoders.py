"""Stage 3: the metric encoders, a small CLIP and a DINO-like vision transformer, trained on the world alone.

The CLIP learns captions against pictures (Radford et al. 2021). The other learns identity without words: two photos of
the same object, in other poses, light and backgrounds, attract each other (InfoNCE), which is what DINO's features are
used for in personalisation: does it show this very subject?
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig, ViTConfig, ViTModel

from mep_lightning.bases.tokens import token_ids
from mep_lightning.tiny.captions import scene_caption
from mep_lightning.tiny.train.loop import Ema, fit
from mep_lightning.tiny.train.text import text_config
from mep_lightning.tiny.world import BACKGROUNDS, Scenes, random_scenes, random_view, render

VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
MEAN, STD = 0.5, 0.5
DINO_TEMPERATURE = 0.1


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(image_size=64, patch_size=8, projection_dim=128, **VISION)
    return CLIPModel(
        CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def build_dino() -> ViTModel:
    return ViTModel(ViTConfig(image_size=64, patch_size=8, **VISION), add_pooling_layer=False)


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def train_clip(
    tokenizer: CLIPTokenizer, out: Path, steps: int = 1200, batch: int = 128, device: str = "cpu"
) -> CLIPModel:
    torch.manual_seed(2)
    clip = build_clip(tokenizer).to(device)
    ema = Ema(clip, 0.995)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        generator, rng = torch.Generator().manual_seed(4_000_000 + step), random.Random(step)
        scenes, named = random_scenes(batch, generator)
        captions = [scene_caption(scenes, named, i, rng, keep=0.9) for i in range(batch)]
        ids, images = token_ids(tokenizer, captions).to(device), normalise(render(scenes)).to(device)
        logits = clip(input_ids=ids, pixel_values=images).logits_per_image.float()
        target = torch.arange(batch, device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"top1": (logits.argmax(0) == target).float().mean().item()}

    fit("clip", clip, loss_fn, steps=steps, lr=1e-3, out=out, ema=ema, weight_decay=0.1)
    ema.copy_to(clip)
    return clip.eval()


def other_view(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """The same objects in another photo."""
    n = len(scenes)
    return scenes.replace(
        background=torch.randint(len(BACKGROUNDS), (n,), generator=generator),
        phase=torch.rand(n, 4, generator=generator),
        **random_view(n, generator),
    )


def train_dino(out: Path, steps: int = 1000, batch: int = 96, device: str = "cpu") -> ViTModel:
    torch.manual_seed(3)
    dino = build_dino().to(device)
    ema = Ema(dino, 0.995)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(5_000_000 + step)
        scenes, _ = random_scenes(batch // 4, generator)
        # four kin of each object differ in one trait: the hard cases that teach hue, slant and badge
        kin = [scenes]
        for trait in ("paint", "pattern", "kind"):
            order = torch.randperm(len(scenes), generator=generator)
            kin.append(scenes.replace(**{trait: getattr(scenes, trait)[order]}))
        family = Scenes(**{f: torch.cat([getattr(k, f) for k in kin]) for f in vars(scenes)})
        images = torch.cat([render(other_view(family, generator)), render(other_view(family, generator))])
        features = dino(pixel_values=normalise(images).to(device)).last_hidden_state[:, 0]  # [2N, D]
        a, b = F.normalize(features.float(), dim=-1).chunk(2)
        logits = a @ b.T / DINO_TEMPERATURE
        same = family_labels(family).to(device)
        loss = (soft_cross_entropy(logits, same) + soft_cross_entropy(logits.T, same.T)) / 2
        return loss, {"top1": same.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean().item()}

    fit("dino", dino, loss_fn, steps=steps, lr=1e-3, out=out, ema=ema, weight_decay=0.05)
    ema.copy_to(dino)
    return dino.eval()


def family_labels(scenes: Scenes) -> Tensor:
    """[N, N] rows that sum to one over the scenes of the same object (a permuted trait may leave it as it was)."""
    keys = torch.cat(
        [scenes.paint, scenes.second, scenes.kind[:, None], scenes.pattern[:, None], scenes.badge_u[:, None]], 1
    )
    same = (keys[:, None] == keys[None]).all(-1).float()
    return same / same.sum(1, keepdim=True)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()
