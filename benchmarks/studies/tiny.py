"""`tiny`: is the embedded base good? Prompt-following by retrieval, the autoencoder's PSNR, and a sheet to look at."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image

from benchmarks.rows import Row, row
from mep_lightning import defaults, load_base
from mep_lightning.evaluation import ClipEncoder, DinoEncoder, generate, grid
from mep_lightning.tiny import CLIP, DINO
from mep_lightning.tiny.captions import scene_caption
from mep_lightning.tiny.subjects import subjects, to_pil
from mep_lightning.tiny.train.vae import psnr
from mep_lightning.tiny.world import random_scenes, render

CAPTIONS = 32
FIRST_SEED = 30_000  # training's seeds start at 1,000,000
SHEET_COLUMNS = 8


def captioned(index: int) -> tuple[list[str], torch.Tensor]:
    """Set `index` of 32 scenes never trained on: captions that say all there is to say, and the rendered images."""
    scenes, named = random_scenes(CAPTIONS, torch.Generator().manual_seed(FIRST_SEED + index))
    return [scene_caption(scenes, named, i, random.Random(i), keep=1.0) for i in range(CAPTIONS)], render(scenes)


def top1(clip: ClipEncoder, captions: list[str], images: list[Image.Image]) -> float:
    """Share of captions whose own image is the nearest of all (text to image)."""
    similarity = clip.encode_texts(captions) @ clip.encode_images(images).T
    return (similarity.argmax(1) == torch.arange(len(captions))).float().mean().item()


def reconstruction_psnr(base: object, count: int = 256) -> float:
    images = render(random_scenes(count, torch.Generator().manual_seed(FIRST_SEED - 1))[0]) * 2 - 1
    vae = base.vae  # type: ignore[attr-defined]
    with torch.no_grad():
        back = torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in images.split(32)])
    return psnr(back, images)


def identity_margin(dino: DinoEncoder) -> tuple[float, float]:
    """Mean DINO cosine between photos of one subject, and between photos of different subjects of one class."""
    features = torch.stack([dino.encode_images(s.photos()) for s in subjects("test")])  # [30, 5, D]
    cosine = torch.einsum("apd,bqd->abpq", features, features)
    same = torch.stack(
        [c[~torch.eye(5, dtype=torch.bool)].mean() for c in cosine.diagonal(dim1=0, dim2=1).movedim(-1, 0)]
    )
    kin = [cosine[a, b].mean() for a in range(30) for b in range(30) if a != b and a % 10 == b % 10]
    return same.mean().item(), torch.stack(kin).mean().item()


def sheet(captions: list[str], images: list[Image.Image], path: Path) -> None:
    """A picture of generated samples with their captions, for people to judge."""
    starts = range(0, len(images), SHEET_COLUMNS)
    lines = [grid.Row("", images[i : i + SHEET_COLUMNS], captions[i : i + SHEET_COLUMNS]) for i in starts]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.draw(lines).image.save(path)


def run(sets: int = 4, picture: Path | None = None) -> list[Row]:
    base, clip, dino = load_base("tiny"), ClipEncoder(CLIP), DinoEncoder(DINO)
    values = defaults.lookup("zoodip", "tiny", "fp32")
    rendered, generated = [], []
    for index in range(sets):
        captions, images = captioned(index)
        rendered.append(top1(clip, captions, to_pil(images)))
        pictures = generate(
            base,
            captions,
            [index] * CAPTIONS,
            steps=values["sampling_steps"],
            guidance=values["guidance"],
            batch_size=16,
        )
        generated.append(top1(clip, captions, pictures))
        if index == 0 and picture is not None:
            sheet(captions, pictures, picture)
        print(f"set {index}: top-1 rendered {rendered[-1]:.3f}, generated {generated[-1]:.3f}", flush=True)
    same, kin = identity_margin(dino)
    return [
        row("tiny", "autoencoder", "PSNR of unseen scenes", round(reconstruction_psnr(base), 2), "dB"),
        row("tiny", "CLIP on rendered scenes", f"top-1 of {CAPTIONS}", round(sum(rendered) / sets, 4), ""),
        row("tiny", "CLIP on generated scenes", f"top-1 of {CAPTIONS}", round(sum(generated) / sets, 4), ""),
        row("tiny", "DINO, same subject", "cosine", round(same, 4), ""),
        row("tiny", "DINO, other subject of the class", "cosine", round(kin, 4), ""),
    ]
