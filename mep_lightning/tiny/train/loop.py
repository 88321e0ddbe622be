"""The loop that every stage of the tiny base's training shares: warm-up, cosine, bf16 autocast, EMA, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mep_lightning.kernels.products import onednn_knows
from mep_lightning.run_folder import replacing

LossFn = Callable[[int], tuple[Tensor, dict[str, float]]]


class Ema:
    """An exponential moving average of a module's parameters, with the usual warm-up of its decay."""

    def __init__(self, module: nn.Module, decay: float = 0.9995):
        self.decay, self.steps = decay, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, p in module.named_parameters():
            self.values[name].lerp_(p, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.values[name])


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def in_bf16(device: torch.device) -> torch.autocast:
    """Autocast to bf16, but on a CPU that would emulate it slowly."""
    knows = device.type != "cpu" or onednn_knows(torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16, enabled=knows)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def fit(
    name: str,
    module: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float,
    out: Path,
    weight_decay: float = 0.01,
    ema: Ema | None = None,
    save_every: int = 500,
    log_every: int = 100,
    stop_at: int | None = None,
) -> None:
    """Train `module`, where it lies, for `steps` steps of `loss_fn(step)`; carries on from `out/<name>.safetensors`.

    `stop_at` ends early, within the schedule of `steps`."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    path = out / f"{name}.safetensors"
    start = _resume(path, module, optimizer, ema)
    module.train()
    began, window = time.monotonic(), []
    end = min(steps, stop_at or steps)
    for step in range(start, end):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        with in_bf16(device_of(module)):
            loss, seen = loss_fn(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if ema:
            ema.update(module)
        window.append(seen | {"loss": loss.item()})
        if (step + 1) % log_every == 0:
            means = {k: sum(w[k] for w in window) / len(window) for k in window[-1]}
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"{name} {step + 1}/{steps}", *(f"{k} {v:.4f}" for k, v in means.items()), f"{pace:.2f} s", flush=True
            )
            window = []
        if (step + 1) % save_every == 0 or step + 1 == end:
            _save(path, step + 1, module, optimizer, ema)


def _save(path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    if ema:
        tensors |= {f"ema.{k}": v for k, v in ema.values.items()}
    with replacing(path) as temporary:
        save_file({k: v.clone() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> int:
    if not path.exists():
        return 0
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
    module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".", 2)
            state["state"].setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(state)
    if ema:
        for name, value in ema.values.items():
            value.copy_(tensors[f"ema.{name}"])
        ema.steps = step
    return step
