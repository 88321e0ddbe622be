"""Loading a base in the precision asked for, frozen and ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mep_lightning.bases.base import Base, BaseFolder
from mep_lightning.bases.conditioning import remember
from mep_lightning.bases.families import TEXT_ENCODERS, TOKENIZERS, describe, is_sdxl, locate
from mep_lightning.bases.frugal import compute_frugally_
from mep_lightning.bases.single_file import is_single_file, open_file
from mep_lightning.bases.streaming import Stream
from mep_lightning.bases.vocabulary import find_vocabulary
from mep_lightning.bases.weights import Tensors, described, fill_, read_part
from mep_lightning.errors import UserError
from mep_lightning.phases import phase
from mep_lightning.quantization import quantize_module_

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
OFFLOADS = ("none", "stream")
QUANTIZED = ("int8", "int4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTEGERS = "int8"
"""Activations of linear layers with int8 weights, for estimators that bear it; all else is then in half precision."""


def activation_dtype(precision: str, device: torch.device, family: str, activations: str = "auto") -> torch.dtype:
    """What a precision computes in.

    By default quantised weights meet fp32 activations on a CPU and fp16 on a GPU: a finite difference with a small mu
    drowns in bf16's rounding, so bf16 is never chosen silently. `tiny` is small enough for fp32 everywhere.

    Raises:
        UserError: `activations` is unknown, or asks weights in floats for another dtype than their own.
    """
    if activations != "auto":
        if activations not in (*DTYPES, INTEGERS):
            raise UserError(
                f"activations {activations!r} are unknown: choose auto or one of {', '.join((*DTYPES, INTEGERS))}"
            )
        if precision not in goes_with(activations):
            weights = "int8" if activations == INTEGERS else "quantised"
            raise UserError(
                f"activations {activations} are for {weights} weights, and precision is {precision}: leave them auto, "
                f"or set precision {' or '.join(dict.fromkeys((activations, 'int8')))}"
            )
        if activations == INTEGERS:
            return torch.float16 if device.type == "cuda" else torch.bfloat16
        return DTYPES[activations]
    if precision in QUANTIZED:
        return torch.float16 if device.type == "cuda" and family != "tiny" else torch.float32
    return DTYPES[precision]


def goes_with(activations: str) -> tuple[str, ...]:
    """The precisions whose weights compute in these activations."""
    return (INTEGERS,) if activations == INTEGERS else (*QUANTIZED, activations)


def exact_device(device: str | torch.device) -> torch.device:
    """A device with its number: "cuda" is the current one."""
    device = torch.device(device)
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device


def open_base(
    name: str | Path = "tiny",
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    offload: str = "none",
    *,
    activations: str = "auto",
    weights: bool = True,
) -> BaseFolder:
    """Find a base and read what it is, but not its weights.

    Args:
        name, precision, device, offload, activations: as for `load_base`.
        weights: False fetches only the JSON files of a hub id.

    Raises:
        UserError: as `load_base` does.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    if offload not in OFFLOADS:
        raise UserError(f"offload {offload!r} is unknown: choose one of {', '.join(OFFLOADS)}")
    folder = locate(name, weights=weights)
    info = describe(folder, name)
    file = open_file(name) if is_single_file(name) else None
    if file is not None and weights:
        find_vocabulary(file)  # what cannot be had is told before gigabytes are read
    device = exact_device(device)
    return BaseFolder(
        name=str(name),
        folder=folder,
        info=info,
        precision=precision,
        dtype=activation_dtype(precision, device, info.family, activations),
        device=device,
        offload=offload,
        file=file,
    )


def load_base(
    name: str | Path = "tiny",
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    offload: str = "none",
    *,
    activations: str = "auto",
    vae: bool = True,
    prompts: Sequence[str] | None = None,
) -> Base:
    """Load a base and freeze it.

    Args:
        name: `tiny`, a folder in diffusers' layout, a hub id (with `@` and a revision, where one is wanted), or a
            single file in safetensors, as SD1, SD2 and SDXL are published in one.
        precision: "fp32", "bf16", "fp16", "int8" or "int4" (U-Net and text encoder; the autoencoder stays in floats).
        device: where to.
        offload: "none", or "stream" for weights that wait outside the device's memory (see `BaseFolder`).
        activations: what int8 and int4 weights compute in, "fp32", "bf16" or "fp16"; "auto" is fp32 on a CPU and fp16
            on a GPU; "int8" is half precision here, as only a training multiplies integers.
        vae: whether the autoencoder comes along; without it `borrowed_vae` reads it when it is needed.
        prompts: where given, the text encoders embed these and leave, before the U-Net comes.

    Raises:
        UserError: an unknown precision, a base that is not there, incomplete or of a family not supported.
    """
    found = open_base(name, precision, device, offload, activations=activations)
    if found.file is not None and found.file.is_guess:
        rank_zero_warn(
            f"{name} does not say what it predicts, and is taken for {found.info.prediction}, as diffusers does: where "
            f"that is wrong, write model: {{params: {{parameterization: eps}}}} (or v) into "
            f"{found.file.path.with_suffix('.yaml')}"
        )
    return assemble(
        found,
        tensors=found.tensors,
        tokenizer=found.read_tokenizer,
        vae=found.read_vae if vae else None,
        prompts=prompts,
    )


def assemble(
    found: BaseFolder,
    *,
    tensors: Callable[[nn.Module, str], Tensors],
    tokenizer: Callable[[str, int], CLIPTokenizer],
    vae: Callable[[], AutoencoderKL] | None,
    prompts: Sequence[str] | None = None,
) -> Base:
    """Put a frozen base together from what its folder describes, one part after the other.

    Args:
        found: the base that is wanted.
        tensors: the weights of a module that was built from a part of that folder.
        tokenizer: makes the tokenizer that is named so there, for a text encoder that reads so many tokens.
        vae: makes the autoencoder; None leaves it out.
        prompts: as for `load_base`.
    """
    folder = found.folder

    def placed(module: nn.Module, part: str) -> list[Stream]:
        if found.precision in QUANTIZED:
            quantize_module_(module, found.precision)
        fill_(module, tensors(module, part), found.source(part), found.dtype, found.weights_device, found.memory_format)
        stream = found.placed(module.eval().requires_grad_(False))
        return [] if stream is None else [stream]

    def read_text_encoders() -> tuple[list[nn.Module], list[Stream]]:
        encoders = build_text_encoders(folder)
        streams = [placed(module, part) for module, part in zip(encoders, TEXT_ENCODERS, strict=False)]
        return encoders, [stream for each in streams for stream in each]

    def read_unet(modules: Sequence[nn.Module]) -> None:
        unet = base.unet
        names = tuple(f"{name}." for name, part in unet.named_modules() if part in set(modules))
        wanted = ((key, value) for key, value in tensors(unet, "unet") if key.startswith(names))
        fill_(unet, wanted, found.source("unet"), found.dtype, found.weights_device, found.memory_format)

    with phase("load"):
        lengths = [config.max_position_embeddings for config in _text_configs(folder)]
        base = Base(
            **vars(found),
            unet=build_unet(folder),
            text_encoders=[],
            read_text_encoders=read_text_encoders,
            read_unet=read_unet,
            tokenizers=[tokenizer(part, length) for part, length in zip(TOKENIZERS, lengths, strict=False)],
            vae=None,
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler", **found.schedule),
            scaling_factor=read_part(AutoencoderKL.load_config, folder / "vae").get("scaling_factor", 0.18215),
        )
        if prompts is None:
            base.text_encoders, base.text_streams = read_text_encoders()
        else:
            remember(base, prompts)
        compute_frugally_(base.unet)
        base.streams += placed(base.unet, "unet")
        if vae is not None:
            base.vae = vae()
            stream = found.placed(base.vae)
            base.streams += [] if stream is None else [stream]
        return base


def build_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net that a folder describes, on the meta device."""
    unet: UNet2DConditionModel = described(UNet2DConditionModel, folder / "unet")
    return unet


def build_text_encoders(folder: Path) -> list[Any]:
    """The text encoders, two for SDXL, that a folder describes, on the meta device."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection) if is_sdxl(folder) else (CLIPTextModel,)
    with torch.device("meta"):
        return [kind(config) for kind, config in zip(kinds, _text_configs(folder), strict=True)]


def _text_configs(folder: Path) -> list[CLIPTextConfig]:
    parts = TEXT_ENCODERS if is_sdxl(folder) else TEXT_ENCODERS[:1]
    return [read_part(CLIPTextConfig.from_pretrained, folder / part) for part in parts]
