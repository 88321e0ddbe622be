"""`published`: what ZOODiP's Table 1 says its methods take, beside what they would as their public scripts do it; and
what is kept of a subject.

Ours take less by design (docs/memory.md), so that the paper's column is checked in its own conditions: diffusers'
scripts and U-Net as they come, everything resident, PyTorch's AdamW with its temporaries, dequantised weights kept by
autograd. Rehearsed with tensors that hold nothing, as the plan is, for SD1.5 at 512 px.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.documents import papers
from benchmarks.performance import made_up
from benchmarks.performance.ordinary import as_it_comes_, plainly_dequantizing_
from benchmarks.rows import Row, row
from mep_lightning import plan
from mep_lightning.adapters import LoRA
from mep_lightning.bases import Base
from mep_lightning.bases.skeleton import skeleton
from mep_lightning.commands.budget import recipe
from mep_lightning.plan.answers import Answers
from mep_lightning.plan.budget import overhead
from mep_lightning.plan.tracker import LiveBytes
from mep_lightning.quantization import Int8Conv2d, Int8Linear
from mep_lightning.quantization.int4 import Int4Linear

GB, MB = 1e9, 1e6
LENGTH = 77
USED = "as public scripts run it, the paper as baseline"
ALONE = "as public scripts run it without class photos, the paper as baseline"
OURS = "ours, planned, the paper as baseline"
KEPT = "ours, exported values, the paper as baseline"


@dataclass(frozen=True)
class Script:
    """How a method is commonly run.

    Attributes:
        ours: the recipe and its precision.
        precision: of U-Net and text encoder.
        dtype: of activations.
        prepare: makes a base ready, answers with what is trained.
        batch: samples a step; 2 with a class photo beside (prior preservation, DreamBooth's default).
        backward: whether there is a backward pass.
    """

    ours: tuple[str, str]
    precision: str
    dtype: torch.dtype
    prepare: Callable[[Base], list[nn.Parameter]]
    batch: int = 1
    backward: bool = True


def whole(base: Base) -> list[nn.Parameter]:
    """DreamBooth: the U-Net."""
    return list(base.unet.requires_grad_(True).parameters())


def table(base: Base) -> list[nn.Parameter]:
    """Textual Inversion's script trains the whole embedding table, and puts all rows but one back after each step."""
    (encoder,) = base.text_encoders
    weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight, nn.Parameter)
    return [weight.requires_grad_(True)]


def low_rank(base: Base) -> list[nn.Parameter]:
    """QLoRA: bitsandbytes packs the U-Net's linear layers, convolutions stay as they are; a LoRA of r = 2."""
    for module in list(base.unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int4Linear.from_float(child))
    adapter = LoRA(rank=2)
    adapter.attach(base, "ball")
    return list(adapter.parameters())


def scales(base: Base, inputs: bool) -> list[nn.Parameter]:
    """PEQA and TuneQDM: weights are made in autograd's sight, which keeps their factors for the backward pass."""
    trained: list[nn.Parameter] = []

    def replace(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, (Int8Linear, Int8Conv2d)):
                setattr(module, name, scaled := Scaled(child, inputs))
                trained.extend(scaled.parameters())
            else:
                replace(child)

    replace(base.unet)
    return trained


class Scaled(nn.Module):
    """s_out * W_int (* s_in), whose scales autograd trains."""

    def __init__(self, layer: Int8Linear | Int8Conv2d, inputs: bool) -> None:
        super().__init__()
        self.layer, shape = [layer], layer.weight.shape
        self.out = nn.Parameter(torch.ones(shape[0], *(1,) * (len(shape) - 1)))
        self.into = nn.Parameter(torch.ones(1, shape[1], *(1,) * (len(shape) - 2))) if inputs else None

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        weight = layer.weight.to(x.dtype)
        if self.into is not None:
            weight = weight * self.into.to(x.dtype)
        weight = weight * self.out.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, Int8Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def nothing(base: Base) -> list[nn.Parameter]:
    """GF-TI and ZOODiP: forward passes of one member after the other."""
    plainly_dequantizing_(base.unet)
    return []


SCRIPTS = {
    "dreambooth": Script(("dreambooth", "fp32"), "fp32", torch.float32, whole, batch=2),
    "qlora": Script(("qlora", "int4"), "fp32", torch.float32, low_rank, batch=2),
    "peqa": Script(("peqa", "int8"), "int8", torch.float16, partial(scales, inputs=False), batch=2),
    "tuneqdm": Script(("tuneqdm", "int8"), "int8", torch.float16, partial(scales, inputs=True), batch=2),
    "textual_inversion": Script(("textual_inversion", "fp32"), "fp32", torch.float32, table),
    "gf_ti": Script(("gf_ti", "int8"), "int8", torch.float32, nothing, backward=False),
    "zoodip": Script(("zoodip", "int8"), "int8", torch.float32, nothing, backward=False),
    "zoodip, fp16 activations": Script(("zoodip", "int8"), "int8", torch.float16, nothing, backward=False),
    "zoodip, int4": Script(("zoodip", "int4"), "int4", torch.bfloat16, nothing, backward=False),
}
"""ZOODiP's Table 1, and its int4. The paper does not say which activations its int8 has; both are here."""


PRIORS = ("qlora", "peqa", "tuneqdm")
"""Those of which the paper leaves open whether class photos are among their batch."""


def paper(name: str) -> float:
    """Bytes, of nvidia-smi, context included."""
    return papers.MEMORY.get(name, papers.MEMORY[name.partition(",")[0]]) * GB


def rehearse(script: Script) -> dict[str, int]:
    """Bytes at the peak of two steps (the second has the optimizer's state), and what of it is there all the time."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes(answer=Answers(fakes))
    gc.collect()
    with fakes, live:
        base = skeleton("sd15", script.precision, dtype=script.dtype)
        assert base.vae is not None
        as_it_comes_(base.unet)
        as_it_comes_(base.vae)
        trained = script.prepare(base)
        resident = live.now
        optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=True) if trained else None
        for _ in range(2):
            live.reset_peak()
            _step(base, script, trained, optimizer)
        peak = live.peak
        state = sum(_bytes(value) for one in (optimizer.state.values() if optimizer else ()) for value in one.values())
    gradients = sum(map(_bytes, trained))
    return {"resident": resident, "gradients": gradients, "optimizer": state, "peak": peak}


def _step(base: Base, script: Script, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    assert base.vae is not None
    pixels = torch.empty(script.batch, 3, 512, 512, dtype=base.vae.dtype)
    with torch.no_grad():
        latents = base.vae.encode(pixels).latent_dist.mode().to(script.dtype)
    with torch.set_grad_enabled(script.backward):
        told = base.text_encoders[0](torch.zeros(script.batch, LENGTH, dtype=torch.int64)).last_hidden_state
        times = torch.zeros(script.batch, dtype=torch.int64)
        predicted = base.unet(latents, times, told).sample
        loss = (predicted.float() - latents.float()).pow(2).mean()
    if optimizer is not None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def ours(method: str, precision: str) -> int:
    """Bytes at the peak of a run of ours, as planned for a GPU."""
    (phases,) = plan.rehearse([recipe(method)(precision, None)], made_up.found("sd15", precision, "cuda"), 512)
    return max(peak.total for peak in phases.values())


def kept(method: str, precision: str) -> int:
    """Bytes of the fp32 values that are exported of a subject."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = recipe(method)(precision, None)
        made_up.named_(module)
        module.take(skeleton("sd15", precision))
        trained = [theta.numel() for theta in module.adapter.parameters() if theta.requires_grad]
    return sum(trained) * torch.float32.itemsize


def run(names: Iterable[str] = SCRIPTS) -> list[Row]:
    """Every script's peak with CUDA's context beside the paper's, what it is made of, ours, and what is exported."""
    rows = []
    for name in names:
        script = SCRIPTS[name]
        found = rehearse(script)
        rows.append(row("published", name, USED, found["peak"] + overhead("cuda"), "B", paper(name)))
        rows += [row("published", name, part, size, "B") for part, size in found.items()]
        rows.append(row("published", name, OURS, ours(*script.ours) + overhead("cuda"), "B", paper(name)))
        print(f"{name}: {(found['peak'] + overhead('cuda')) / GB:.2f} GB, the paper {paper(name) / GB:g}", flush=True)
        if name in PRIORS:
            alone = rehearse(replace(script, batch=1))["peak"] + overhead("cuda")
            rows.append(row("published", name, ALONE, alone, "B", paper(name)))
        if name in papers.STORAGE:
            rows.append(row("published", name, KEPT, kept(*script.ours), "B", papers.STORAGE[name] * MB))
    return rows
