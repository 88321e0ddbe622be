"""Quantisation scales: of an int8 U-Net W = s q the integers stay and the scales are trained.

PEQA (Kim et al. 2023, arXiv 2305.14152) trains one scale an output channel. TuneQDM (Ryu et al. 2024, arXiv 2401.04339)
trains one an input channel as well, W = s_out q s_in, of which s_in begins at 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mep_lightning.adapters.adapter import LayerAdapter, in_order, read_export, take_shapes
from mep_lightning.adapters.targets import keep_rows_together, matching, undotted
from mep_lightning.bases import Base
from mep_lightning.errors import UserError, refuse_unless
from mep_lightning.quantization import Int8Conv2d, Int8Linear
from mep_lightning.run_folder import replacing

if TYPE_CHECKING:
    from mep_lightning.adapters.scale_layers import ScaledLayer

FILE = "scales.safetensors"
OUTPUT, INPUT = ".scale", ".input_scale"


class QuantizationScales(LayerAdapter):
    """The scales of an int8 U-Net's linear layers and convolutions.

    Args:
        token: the word that names the subject in prompts, before the class word; one that the base hardly knows.
        input_channels: train one scale an input channel too (TuneQDM).
        targets: names of the U-Net's layers, or their ends; all by default.

    Raises:
        UserError: a setting out of range.
    """

    FILES = (FILE,)
    precisions = ("int8",)

    def __init__(self, token: str = "sks", input_channels: bool = False, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        refuse_unless(bool(token.strip()), "QuantizationScales.token", token, "a word, such as sks")
        fine = targets is None or len(targets) > 0
        refuse_unless(fine, "QuantizationScales.targets", targets, "at least one layer's name, such as to_q, or null")
        self.token, self.input_channels = token, input_channels
        self.targets = None if targets is None else list(targets)
        self.output, self.input = nn.ParameterDict(), nn.ParameterDict()

    # -- in the base ---------------------------------------------------------------------------------------------------

    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        """Let the targeted layers read their scales here; they begin at the base's own, those of inputs at 1.

        Raises:
            UserError: the base is not in int8, or what was loaded is of another U-Net.
        """
        from mep_lightning.adapters.scale_layers import KINDS, Scales, Standing

        if base.precision not in self.precisions:
            raise UserError(
                f"QuantizationScales are those of int8 weights, and these are {base.precision}: take precision int8"
            )
        self.detach()
        self.move_in(base)
        kinds = Int8Linear, Int8Conv2d
        layers: Any = matching(base.unet, self.targets, without, "QuantizationScales.targets", kinds)
        self._refuse_another_shape(base, layers)
        if not self.output:
            for name, layer in layers.items():
                self.output[undotted(name)] = nn.Parameter(layer.scale.detach().float().cpu().clone())
                if self.input_channels:
                    self.input[undotted(name)] = nn.Parameter(torch.ones(layer.weight_shape[1]))
        places = [undotted(name) for name in layers]
        self.output, self.input = in_order(self.output, places), in_order(self.input, places)
        self._standing, self._layers, self.names = Standing(), layers, list(layers)
        for index, (name, layer) in enumerate(layers.items()):
            mine = [part[undotted(name)] for part in (self.output, self.input) if part]
            for theta in mine:
                theta.data = theta.data.to(base.device)
            layer.__class__ = KINDS[type(layer)]
            into = mine[1] if self.input_channels else None
            layer.scales = Scales(self._standing, mine[0], into, (index, len(layers) + index))
        keep_rows_together(base.unet, self.layers)
        self.remember_origin(base, class_word)

    def _refuse_another_shape(self, base: Base, layers: Mapping[str, ScaledLayer]) -> None:
        """What was loaded must fit the layers that are there."""
        there = {undotted(name): layer.weight.shape[:2] for name, layer in layers.items()}
        fits = all(
            not part
            or {name: len(scale) for name, scale in part.items()} == {k: shape[at] for k, shape in there.items()}
            for at, part in ((0, self.output), (1, self.input))
        )
        if not fits or (bool(self.output) and self.input_channels != bool(self.input)):
            raise UserError(
                f"there are scales of {len(self.output)} layers, and {base.name} has {len(there)} of its targets or of "
                "other widths: use the base that they were trained on, and their settings"
            )

    def detach(self) -> None:
        """Let the layers compute with the base's own scales again."""
        for layer in self._layers.values():
            layer.__class__ = type(layer).plain
            del layer.scales
        self._layers = {}

    def numbered(self) -> dict[int, nn.Parameter]:
        """Those of outputs, then those of inputs."""
        both = enumerate([*self.output.values(), *self.input.values()])
        return {param_id: theta for param_id, theta in both if theta.requires_grad}

    @contextmanager
    def away(self) -> Iterator[None]:
        self._standing.is_away = True
        try:
            yield
        finally:
            self._standing.is_away = False

    # -- files ---------------------------------------------------------------------------------------------------------

    def export(self, directory: Path) -> list[Path]:
        """`scales.safetensors`: `<layer>.scale` fp32 [O] and, where trained, `<layer>.input_scale` fp32 [I]."""
        self.refuse_empty()
        self.refuse_infinite()
        path = Path(directory) / FILE
        tensors = {
            f"{name}{end}": part[undotted(name)].detach().float().cpu().contiguous()
            for name in self.names
            for end, part in ((OUTPUT, self.output), (INPUT, self.input))
            if part
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, self.metadata())
        return [path]

    def load_export(self, directory: Path) -> None:
        path = Path(directory) / FILE
        tensors, origin = read_export(Path(directory), FILE)
        names = [key.removesuffix(OUTPUT) for key in tensors if key.endswith(OUTPUT)]
        inputs = [key.removesuffix(INPUT) for key in tensors if key.endswith(INPUT)]
        is_whole = names and len(names) + len(inputs) == len(tensors) and (not inputs or set(inputs) == set(names))
        if not is_whole or any(value.dim() != 1 for value in tensors.values()):
            raise UserError(f"{path} holds no scales of a U-Net (….scale, and ….input_scale for all or none)")
        self.targets, self.names, self.input_channels = names, list(names), bool(inputs)
        self.token = origin.pop("token", self.token)
        self.origin = origin
        for part, end in ((self.output, OUTPUT), (self.input, INPUT)):
            part.clear()
            for name in names if end == OUTPUT else inputs:
                part[undotted(name)] = nn.Parameter(tensors[name + end].float())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """A checkpoint may come before `attach`: take the shapes it has."""
        take_shapes(self.output, state_dict, f"{prefix}output.")
        take_shapes(self.input, state_dict, f"{prefix}input.")
        super()._load_from_state_dict(state_dict, prefix, *args)
