"""Linear layers and convolutions with a low-rank term beside their frozen weight, for one member or for many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F

from mep_lightning.estimators.perturbation import HERE, Members, Tangents
from mep_lightning.kernels import perturbed_lora_linear
from mep_lightning.kernels.dispatch import runs_triton
from mep_lightning.quantization import Int8Linear, QuantizedWeight

ADAPTER = "default"
"""peft's name for the only adapter that a layer has."""


@dataclass
class Standing:
    """What all layers of a LoRA read when they compute.

    Attributes:
        members: who asks; their rows lie one after the other.
        scale: of every low-rank term; 0 leaves the base as it is.
    """

    members: Members = HERE
    scale: float = 1.0


class _LoRALayer:
    """What ours do otherwise than peft's: the low-rank term follows the activations' dtype (peft keeps a copy of them
    in fp32 for the backward pass), many members compute at once, and merging knows packed weights."""

    standing: Standing
    ids: tuple[int, int]
    base_layer: nn.Module
    scaling: dict[str, float]

    def stand(self, standing: Standing, ids: tuple[int, int], down: nn.Parameter, up: nn.Parameter) -> None:
        """Compute from these factors, whose parameter ids are known, wherever the LoRA's members stand."""
        self.standing, self.ids = standing, ids
        self.lora_A[ADAPTER].weight = down  # type: ignore[attr-defined]
        self.lora_B[ADAPTER].weight = up  # type: ignore[attr-defined]

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: peft would cast the factors as well, and `stand` brings others."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, ...] and B [O, r, ...]."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight  # type: ignore[attr-defined]

    @property
    def strength(self) -> float:
        """alpha / r, times the scale asked for."""
        return self.scaling[ADAPTER] * self.standing.scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The frozen layer's answer and the low-rank term; x member-major."""
        if not self.strength:
            return self.base_layer(x)
        members, y = self.standing.members, self.base_layer(x)
        if members.is_alone or isinstance(members, Tangents):  # one member, whose factors may have tangents
            x = x.to(y.dtype)  # autocast's, where it is on
            down, up = (self._at(members, index)[0].to(y.dtype) for index in range(2))
            return torch.add(y, self.term(x, down, up), alpha=self.strength)
        down, up = (self._at(members, index) for index in range(2))
        with torch.autocast(x.device.type, enabled=False):  # it would round mu away
            term = self.many_terms(x.float(), down.float(), up.float())
        return term.mul_(self.strength).add_(y).to(y.dtype)

    def _at(self, members: Members, index: int) -> Tensor:
        """Members' values of A or B, [V, r, ...] or [V, O, r, ...]; what is frozen is the same for all."""
        factor = self.factors[index]
        moves = factor.requires_grad or members.is_here
        return members.of(factor, self.ids[index]) if moves else factor.expand(len(members), *factor.shape)

    def term(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def many_terms(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """As `term`, with factors of V members."""
        return torch.cat([self.term(*one) for one in zip(x.chunk(len(down)), down, up, strict=True)])

    @torch.no_grad()
    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the low-rank term to the frozen weight, which is packed anew where it was packed, and switch it off."""
        layer, delta = self.base_layer, self.get_delta_weight(ADAPTER) * self.standing.scale  # type: ignore[attr-defined]
        if isinstance(layer, QuantizedWeight):
            layer.quantize_(layer.dequantize().add_(delta))
        else:
            layer.weight.data = (layer.weight.float() + delta).to(layer.weight.dtype)
        self.scaling[ADAPTER] = 0.0


class LoRALinear(_LoRALayer, PeftLinear):
    """x W' + b + strength * (x A') B'."""

    def term(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    def many_terms(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(len(down), -1, x.shape[-1])  # [V, N, I]
        return (rows @ down.mT @ up.mT).view(*x.shape[:-1], -1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [V * N, ..., I] -> [..., O]."""
        members, layer = self.standing.members, self.base_layer
        moves = not (members.is_alone or isinstance(members, Tangents)) and all(f.requires_grad for f in self.factors)
        fused = moves and self.strength and isinstance(layer, Int8Linear) and runs_triton(x)
        if not fused or layer.weight.device != x.device:  # a streamed one comes when the layer itself is called
            return super().forward(x)
        assert isinstance(layer, Int8Linear)
        return perturbed_lora_linear(
            x,
            layer.weight,
            layer.scale,
            layer.bias,
            *self.factors,
            self.strength,
            list(members.probes),
            members.mu,
            members.seed,
            members.step,
            self.ids,
        )


class LoRAConv2d(_LoRALayer, PeftConv2d):
    """W * x + b + strength * B * (A * x), B of 1x1."""

    def term(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        layer: Any = self.base_layer
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding), up)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}
"""Which layer stands in for which, subclasses with packed weights included."""
