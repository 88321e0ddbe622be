"""Small models of SD1's, SD2's and SDXL's build, each as a folder and as the single file that publishers write.

A file's names are worked out here, from those of diffusers' layout, apart from any code that reads them.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mep_lightning.bases.families import TINY_FOLDER
from tests import sdxl

KINDS = ("sd15", "sd21", "sdxl")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def renamed(key, pairs):
    for pattern, new in pairs:
        key = re.sub(pattern, new, key)
    return key


def unet_names(tensors, layers):
    """A U-Net's tensors under the names of CompVis' and Stability's code, of blocks of so many layers."""

    def block(name, first, layer=None):
        def number(found):
            return (layers + 1) * int(found[1]) + (int(found[2]) if layer is None else layer) + first

        return lambda found: f"{name}_blocks.{number(found)}."

    has_attention = {key.split(".")[1] for key in tensors if re.match(r"up_blocks\.\d+\.attentions", key)}
    pairs = [
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"(resnets\.\d+\.)norm1\.", r"\1in_layers.0."),
        (r"(resnets\.\d+\.)conv1\.", r"\1in_layers.2."),
        (r"(resnets\.\d+\.)time_emb_proj\.", r"\1emb_layers.1."),
        (r"(resnets\.\d+\.)norm2\.", r"\1out_layers.0."),
        (r"(resnets\.\d+\.)conv2\.", r"\1out_layers.3."),
        (r"(resnets\.\d+\.)conv_shortcut\.", r"\1skip_connection."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: block("input", 1)(m) + "0."),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: block("input", 1)(m) + "1."),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", lambda m: block("input", 1, layers)(m) + "0.op."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: block("output", 0)(m) + "0."),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: block("output", 0)(m) + "1."),
        (
            r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.",
            lambda m: block("output", 0, layers)(m) + ("2." if m[1] in has_attention else "1.") + "conv.",
        ),
    ]
    return {UNET + renamed(key, pairs): value for key, value in tensors.items()}


def vae_names(tensors):
    """An autoencoder's, whose attention was once made of convolutions."""
    last = max(int(key.split(".")[2]) for key in tensors if key.startswith("decoder.up_blocks."))
    pairs = [
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block."),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
    ]
    named = {VAE + renamed(key, pairs): value for key, value in tensors.items()}
    return {k: v[:, :, None, None] if "attn_1" in k and v.dim() == 2 else v for k, v in named.items()}


def clip_names(tensors, prefix):
    """Of a text encoder that is CLIP's own."""
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}


def open_clip_names(tensors, prefix):
    """Of open_clip's: query, key and value in one, and a projection that is applied from the other side."""
    tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    pairs = [
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm([12])\.", r"ln_\1."),
        (r"mlp\.fc1\.", "mlp.c_fc."),
        (r"mlp\.fc2\.", "mlp.c_proj."),
        (r"self_attn\.", "attn."),
        (r"^final_layer_norm\.", "ln_final."),
        (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    ]
    named = {}
    for key, value in tensors.items():
        if fused := re.match(r"(.*self_attn\.)q_proj\.(weight|bias)", key):
            parts = [tensors[f"{fused[1]}{which}_proj.{fused[2]}"] for which in "qkv"]
            named[renamed(fused[1], pairs) + f"in_proj_{fused[2]}"] = torch.cat(parts)
        elif key == "text_projection.weight":
            named["text_projection"] = value.T.contiguous()
        elif not re.search(r"self_attn\.[kv]_proj", key):
            named[renamed(key, pairs)] = value
    named["logit_scale"] = torch.ones(())
    return {prefix + key: value for key, value in named.items()}


def sd2_text_names(tensors):
    """Of SD2's: the file also holds the last layer, which is not used, and a projection that is not either."""
    named, blocks = open_clip_names(tensors, OPEN_CLIP), f"{OPEN_CLIP}transformer.resblocks."
    last = max(int(key.removeprefix(blocks).split(".")[0]) for key in named if key.startswith(blocks))
    used = [key for key in named if key.startswith(f"{blocks}{last}.")]
    unused = {key.replace(f"{blocks}{last}.", f"{blocks}{last + 1}."): torch.ones_like(named[key]) for key in used}
    scale = named[f"{OPEN_CLIP}ln_final.weight"]
    return named | unused | {f"{OPEN_CLIP}text_projection": scale.new_ones(len(scale), len(scale))}


def original(kind, parts, layers):
    """All of a base's tensors as its single file has them.

    Args:
        kind: one of `KINDS`.
        parts: part -> its tensors in diffusers' layout.
        layers: of each of the U-Net's blocks.
    """
    named = unet_names(parts["unet"], layers) | vae_names(parts["vae"])
    if kind == "sd15":
        return named | clip_names(parts["text_encoder"], CLIP)
    if kind == "sd21":
        return named | sd2_text_names(parts["text_encoder"])
    return named | clip_names(parts["text_encoder"], XL_CLIP) | open_clip_names(parts["text_encoder_2"], XL_OPEN_CLIP)


def stored_parts(folder):
    return {path.parent.name: load_file(path) for path in sorted(Path(folder).glob("*/*.safetensors"))}


def save(root):
    """Write each base as a folder and as a file, what describes them as `architectures/`, and `tokenizer/` beside."""
    shutil.copytree(TINY_FOLDER / "tokenizer", root / "tokenizer")
    _save_folder(root / "sd15", 768, heads=2, linear=False, prediction="epsilon", pad="<|endoftext|>")
    _save_folder(root / "sd21", 1024, heads=(2, 4), linear=True, prediction="v_prediction", pad="!")
    sdxl.save(root / "sdxl")
    for kind in KINDS:
        ignored = shutil.ignore_patterns("*.safetensors", "tokenizer*")
        shutil.copytree(root / kind, root / "architectures" / kind, ignore=ignored)
        layers = json.loads((root / kind / "unet/config.json").read_text())["layers_per_block"]
        save_file(original(kind, stored_parts(root / kind), layers), root / f"{kind}.safetensors")


def _save_folder(path, width, *, heads, linear, prediction, pad):
    tokenizer = CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer", model_max_length=32)
    tokenizer.pad_token = pad
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": AutoencoderKL(
                block_out_channels=(8, 8, 16),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=4,
            ),
            "unet": UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16, 16),
                layers_per_block=2,
                norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=heads if linear is False else (*heads, 4),
                use_linear_projection=linear,
                cross_attention_dim=width,
            ),
            "text_encoder": CLIPTextModel(text),
        }
        for part in parts.values():  # biases and norms too, which would all be alike
            for value in part.parameters():
                torch.nn.init.normal_(value, std=0.05) if value.dim() < 2 else None
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False, steps_offset=1
    )
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, **unused).save_pretrained(path)
