"""A model of SDXL's build and no size, as `StableDiffusionXLPipeline.save_pretrained` writes it."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mep_lightning.bases.families import TINY_FOLDER

WIDTHS = (24, 40)
SIDE = 32  # px


def text_config(width):
    return CLIPTextConfig(
        vocab_size=len(CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=20,
        eos_token_id=2,  # as SDXL's: the prompt's embedding is then that of the largest id
    )


def save(path):
    """Write it, random but always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                scaling_factor=0.13025,
            ),
            "unet": UNet2DConditionModel(
                sample_size=SIDE // 2,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                cross_attention_dim=sum(WIDTHS),
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=20 + 6 * 4,
            ),
            "text_encoder": CLIPTextModel(text_config(WIDTHS[0])),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(WIDTHS[1])),
        }
    tokenizers = [CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer") for _ in range(2)]
    tokenizers[1].pad_token = "!"  # as SDXL's second
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.save_pretrained(path)
