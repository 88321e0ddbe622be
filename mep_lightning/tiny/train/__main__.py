"""`python -m mep_lightning.tiny.train --out DIR`: train every stage, carrying on where a stopped run left off."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mep_lightning.tiny.train.diffusion import CachedScenes, train_diffusion
from mep_lightning.tiny.train.encoders import train_clip, train_dino
from mep_lightning.tiny.train.publish import publish_base, publish_encoders
from mep_lightning.tiny.train.text import write_tokenizer
from mep_lightning.tiny.train.vae import train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints; trained stages are not repeated"
    )
    parser.add_argument("--stage", choices=["vae", "diffusion", "encoders", "all"], default="all")
    parser.add_argument("--diffusion-steps", type=int, default=12_000)
    parser.add_argument(
        "--stop-at", type=int, default=None, help="stop the diffusion stage early, its average as it is"
    )
    parser.add_argument("--publish", type=Path, default=None, help="where the finished folders go")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=found, help="default: cuda where there is one")
    args = parser.parse_args()
    if args.device == "cuda" and found == "cpu":
        parser.error("--device cuda: no CUDA device is here; use cpu")
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = write_tokenizer(args.out / "tokenizer")
    if args.stage in ("encoders", "all"):
        clip, dino = train_clip(tokenizer, args.out, device=args.device), train_dino(args.out, device=args.device)
        if args.publish:
            publish_encoders(clip, dino, tokenizer, args.publish)
    if args.stage == "encoders":
        return
    vae = train_vae(args.out, device=args.device)
    if args.stage == "vae":
        return
    data = CachedScenes(vae, args.out)
    vae.register_to_config(scaling_factor=data.scaling_factor())
    unet, text_encoder = train_diffusion(
        data,
        vae.config.scaling_factor,
        tokenizer,
        args.out,
        args.diffusion_steps,
        stop_at=args.stop_at,
        device=args.device,
    )
    if args.publish:
        torch.set_grad_enabled(False)
        publish_base(vae, unet, text_encoder, args.publish / "base")


if __name__ == "__main__":
    main()
