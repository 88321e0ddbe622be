"""A run played through with tensors that hold nothing: how much memory each of its phases would take.

The real module, on a base of the real size, in fake tensors: no weights are read, no GPU is needed, seconds suffice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base, BaseFolder, predict_noise
from mep_lightning.bases.load import assemble
from mep_lightning.bases.skeleton import made_up, skeleton_vae, tokenizer, unwritten
from mep_lightning.bases.streaming import streamed_bytes
from mep_lightning.kernels.int8_conv2d import PORTION
from mep_lightning.module import PersonalizationModule
from mep_lightning.plan.tracker import LiveBytes

PROMPT = "a photo of {}"
WORD = "ball"
"""What the subject is: a word of the tokenizer that stands in for the base's own."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that a phase holds, and what for."""

    weights: int
    activations: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def rehearse(
    modules: Iterable[PersonalizationModule],
    found: BaseFolder,
    resolution: int,
    *,
    batch_size: int = 1,
    pictures: int = 1,
) -> list[dict[str, Peak]]:
    """Play runs through that differ in their module alone.

    Args:
        modules: fresh, as recipes make them; each takes the fake base and is of no use afterwards.
        found: the base, its precision, and its dtype and device as they will be.
        resolution: side of the photos and of the pictures in px.
        batch_size: samples a step.
        pictures: how many are denoised at once when samples are drawn, each twice for the guidance.

    Returns:
        For every module the peak of every phase: encode, load, step, denoise, decode.
    """
    live = LiveBytes(inside=partial(transient, on_cpu=found.device.type == "cpu"))
    # Fakes of a CUDA device would need a CUDA build of torch.
    host = replace(found, device=torch.device("cpu"), offload="none")
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        encode, decode = _autoencoder(live, host, resolution, _streams(found))
        gc.collect()
        live.reset_peak()
        base = assemble(host, tensors=lambda part, _: made_up(part, unwritten), tokenizer=tokenizer, vae=None)
        load = Peak(weights=live.now, activations=live.peak - live.now)
        if found.device.type != "cuda":  # nothing is parked: the autoencoder comes beside the U-Net
            decode = replace(decode, weights=decode.weights + live.now)
        streamed = sum(map(streamed_bytes, (base.unet, *base.text_encoders))) if _streams(found) else None
        return [
            {
                "encode": encode,
                "load": load if streamed is None else Peak(weights=streamed, activations=0),
                **_training(live, module, base, resolution, batch_size, pictures, streamed),
                "decode": decode if streamed is None else replace(decode, weights=decode.weights + streamed),
            }
            for module in modules
        ]


def _training(
    live: LiveBytes,
    module: PersonalizationModule,
    base: Base,
    resolution: int,
    batch_size: int,
    pictures: int,
    streamed: int | None,
) -> dict[str, Peak]:
    """A step, and drawing samples between steps; `streamed` is what streamed weights take on the device."""
    module.class_word = WORD
    if isinstance(module.adapter, TokenEmbedding):
        module.adapter.init = WORD
    gc.collect()
    resident = live.now
    module.take(base)
    module.predict_noise = predict_noise  # a rehearsal under `torch.compile` would spoil the compilation of the run
    weights = live.now
    kept = _state(module)
    held = {"weights": weights, "optimizer": live.now - weights}
    gradients = sum(p.numel() * p.element_size() for p in module.adapter.parameters())
    side = resolution // base.vae_factor
    latents = torch.empty(batch_size, base.unet.config.in_channels, side, side)
    batch = {"mean": latents, "std": latents, "prompts": [PROMPT] * batch_size}
    training = _peak(live, lambda: step(module, batch), **held, gradients=gradients)
    drawing = _peak(live, lambda: denoise(module, side, pictures), **held)
    del kept, module.adapter  # what it trains is gone before the next one comes
    module.base = None
    if streamed is not None:
        waiting = resident - streamed
        training, drawing = (replace(peak, weights=peak.weights - waiting) for peak in (training, drawing))
    return {"step": training, "denoise": drawing}


def _streams(found: BaseFolder) -> bool:
    """Whether weights wait outside the device's memory; a CPU's are in its own, if only as long as there is room."""
    return found.offload == "stream" and found.device.type == "cuda"


def _peak(live: LiveBytes, run: Callable[[], object], **held: int) -> Peak:
    """What something takes beside what is held already."""
    gc.collect()
    live.reset_peak()
    run()
    return Peak(**held, activations=max(live.peak - sum(held.values()), 0))


@torch.no_grad()
def _autoencoder(live: LiveBytes, found: BaseFolder, resolution: int, streams: bool) -> tuple[Peak, Peak]:
    """Encoding a photo and decoding a picture."""
    vae = skeleton_vae(found, unwritten)
    weights, side = live.now, resolution // found.vae_factor
    pixels = torch.empty(1, 3, resolution, resolution, dtype=vae.dtype)
    latent = torch.empty(1, vae.config.latent_channels, side, side, dtype=vae.dtype)
    encode = _peak(live, lambda: vae.encode(pixels), weights=weights)
    decode = _peak(live, lambda: vae.decode(latent), weights=weights)
    held = streamed_bytes(vae) if streams else weights
    return replace(encode, weights=held), replace(decode, weights=held)


def _state(module: PersonalizationModule) -> list[Tensor]:
    """What Adam and the subspace keep: two moments of every parameter, the path and its basis."""
    kept = [torch.zeros_like(p) for p in module.adapter.parameters() for _ in range(2)]
    if module.subspace is not None:
        kept += [
            torch.zeros(int(module.subspace.tau), p.numel()) for p in module.adapter.parameters() for _ in range(2)
        ]
    return kept


def step(module: PersonalizationModule, batch: dict[str, Any]) -> None:
    """What one training step computes; batch as `SubjectData` gives it, without its photos' rows."""
    draw = module.draw(batch)
    module.estimator.estimate(lambda members: module.losses(members, draw), module.adapter.theta)


@torch.no_grad()
def denoise(module: PersonalizationModule, side: int, pictures: int) -> None:
    """One denoising step of so many pictures, `side` latents wide, with guidance."""
    base, device = module.base, module.adapter.theta.device
    assert base is not None
    told = module.condition_on([PROMPT.format(module.adapter.phrase(module.class_word))] * 2 * pictures)
    noise = torch.randn(2 * pictures, base.unet.config.in_channels, side, side, dtype=base.dtype, device=device)
    times = torch.zeros(2 * pictures, dtype=torch.int64, device=device)
    base.unet(noise, times, told.embeds, added_cond_kwargs=told.added(noise))


def transient(operation: Any, args: tuple[Any, ...], on_cpu: bool = False) -> int:
    """Bytes that an operation holds only while it runs.

    Our own hold the dequantised weight. On a CPU oneDNN brings every convolution's weight into an order of its own.
    """
    name = str(operation)
    if name.startswith("mep_lightning.int8_linear."):
        return args[1].numel() * args[0].element_size()
    if name.startswith("mep_lightning.int8_conv2d."):
        weight = args[1].numel() * args[0].element_size()
        return 2 * min(weight, PORTION) if on_cpu else weight
    if name.startswith("aten.convolution.") and on_cpu:
        return args[1].numel() * args[1].element_size()
    return 0
