"""Small random-weight networks in the shapes of the real ones: a Stable Diffusion, a CLIP and a DINO."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mep_lightning.bases import Conditioning

CONTEXT = 24
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells letter by letter."""
    letters = "abcdefghijklmnopqrstuvwxyz<>_.,0123456789"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


@dataclass
class StandIn:
    """What `generate` needs of a base."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    spare_vae: AutoencoderKL
    scheduler: DDPMScheduler
    name: str = "stand-in"
    family: str = "sd1"
    precision: str = "fp32"
    resolution: int = 16
    vae_factor: int = 2
    dtype: torch.dtype = torch.float32
    vae: AutoencoderKL | None = None

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        self.text_encoders, self.tokenizers = [self.text_encoder], [self.tokenizer]
        self.events: list[str] = []

    @contextmanager
    def borrowed_vae(self, half: str) -> Any:
        assert half == "decoder"
        self.events.append("vae borrowed")
        yield self.spare_vae
        self.events.append("vae returned")

    @contextmanager
    def parked(self) -> Any:
        self.events.append("U-Net parked")
        yield
        self.events.append("U-Net back")

    def pipeline(self, vae: AutoencoderKL | None) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler, None, None, requires_safety_checker=False
        )


class Personalised:
    """A module with a token whose vector is `theta`: the prompt embeddings move where it stands."""

    def __init__(self, base: StandIn, theta: float = 0.0) -> None:
        self.base, self.theta = base, theta

    def condition_on(self, prompts: list[str]) -> Conditioning:
        embeds = encode(self.base, prompts)
        here = torch.tensor(["<sks>" in prompt for prompt in prompts])
        return Conditioning(embeds + self.theta * here[:, None, None])


def encode(base: StandIn, prompts: list[str]) -> torch.Tensor:
    ids = base.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    return base.text_encoder(ids).last_hidden_state.detach()


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            eos_token_id=tokenizer.eos_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
        parts = (unet.eval(), CLIPTextModel(text).eval(), tokenizer, vae.eval())
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return StandIn(*parts, DDPMScheduler(**schedule, steps_offset=1))


@pytest.fixture
def base(stand_in: StandIn) -> StandIn:
    stand_in.events.clear()
    return stand_in


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(folder)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        for parameter in model.parameters():  # its own initialisation is so small that every picture looks alike
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO-like ViT of random weights as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ViTModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size=24, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD).save_pretrained(folder)
    return folder


@pytest.fixture
def personalised(base: StandIn) -> Personalised:
    return Personalised(base)
