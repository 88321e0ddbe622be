"""LoRA (arXiv 2106.09685): a low-rank term beside frozen weights of the U-Net, by peft's layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mep_lightning.adapters.adapter import LayerAdapter, in_order, read_export, take_shapes
from mep_lightning.adapters.targets import keep_rows_together, matching, undotted
from mep_lightning.bases import Base
from mep_lightning.errors import UserError, refuse_unless
from mep_lightning.run_folder import replacing

if TYPE_CHECKING:
    from mep_lightning.adapters.lora_layers import LoRAConv2d, LoRALinear

FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
KOHYA_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""What kohya's scripts call a family. A1111 shows a LoRA beside bases of the family that its file names, and takes a
file that names none for SD1's."""


class LoRA(LayerAdapter):
    """W x becomes W x + (alpha / rank) B A x in the layers that are targeted; W stays frozen, in whatever precision.

    Args:
        token: the word that names the subject in prompts, before the class word; one that the base hardly knows.
        rank: r; "auto" is what a module takes from its defaults.
        alpha: the term's strength times r; None is `rank`, a strength of 1.
        targets: names of the U-Net's linear layers and convolutions, or their ends; q, k, v and out of every attention
            by default.
        freeze_down: leave A as it was drawn and train B alone (MobiZO).
        seed: A is drawn from.

    Raises:
        UserError: a rank or alpha out of range.
    """

    FILES = (FILE, KOHYA_FILE)
    AUTO: ClassVar[dict[str, str]] = {"rank": "rank"}

    def __init__(
        self,
        token: str = "sks",
        rank: int | Literal["auto"] = "auto",
        alpha: float | None = None,
        targets: Sequence[str] = ATTENTION,
        freeze_down: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_unless(bool(token.strip()), "LoRA.token", token, "a word, such as sks")
        refuse_unless(rank == "auto" or (isinstance(rank, int) and rank >= 1), "LoRA.rank", rank, "1, 2, ..., or auto")
        refuse_unless(alpha is None or 0 < alpha < math.inf, "LoRA.alpha", alpha, "a number above 0, or null")
        refuse_unless(len(targets) > 0, "LoRA.targets", targets, "at least one layer's name, such as to_q")
        self.token, self.rank, self.alpha, self.targets = token, rank, alpha, list(targets)
        self.freeze_down, self.seed = freeze_down, seed
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.scale, self.first_id = 1.0, 0
        self.family: str | None = None  # of the base, once it has met one
        self._layers: dict[str, LoRALinear | LoRAConv2d]
        self._within: list[nn.Module] = []  # the U-Net, which is no part of the adapter

    # -- in the base ---------------------------------------------------------------------------------------------------

    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        """Put a layer in every target's place: factors A [r, I], uniform up to 1 / sqrt(I), and B [O, r], zeros."""
        from mep_lightning.adapters.lora_layers import Standing

        if isinstance(self.rank, str):
            raise UserError("LoRA.rank is 'auto' outside a module; set it, such as rank=16")
        self.detach()
        self.move_in(base)
        self.names = list(matching(base.unet, self.targets, without, "LoRA.targets"))
        self._standing = Standing(scale=self.scale)
        self._layers = _inject(base.unet, self.names, self.rank, self.alpha or self.rank)
        self._within, self.family = [base.unet], base.family
        if not self.down:
            generator = torch.Generator().manual_seed(self.seed)
            for name, layer in self._layers.items():
                down, up = (torch.zeros(factor.shape, dtype=torch.float32) for factor in layer.factors)
                down.uniform_(-1, 1, generator=generator).div_(math.sqrt(down[0].numel()))
                self.down[undotted(name)], self.up[undotted(name)] = nn.Parameter(down), nn.Parameter(up)
        self._refuse_another_shape(base)
        places = [undotted(name) for name in self._layers]
        self.down, self.up = in_order(self.down, places), in_order(self.up, places)
        for index, (name, layer) in enumerate(self._layers.items()):
            down, up = self.down[undotted(name)], self.up[undotted(name)]
            down.requires_grad_(not self.freeze_down)
            down.data, up.data = down.data.to(base.device), up.data.to(base.device)
            ids = self.first_id + index, self.first_id + len(self._layers) + index
            layer.stand(self._standing, ids, down, up)
        keep_rows_together(base.unet, self.layers)
        self.remember_origin(base, class_word)

    def _refuse_another_shape(self, base: Base) -> None:
        """What was loaded must fit the layers that are there."""
        mine = {name: (down.shape[1:], len(self.up[name])) for name, down in self.down.items()}
        pairs = {undotted(name): layer.factors for name, layer in self._layers.items()}
        there = {name: (down.shape[1:], len(up)) for name, (down, up) in pairs.items()}
        if mine != there:
            raise UserError(
                f"the LoRA has {len(self.up)} layers, and {base.name} {len(there)} of its targets or of other widths: "
                "use the base that it was trained on, and its targets"
            )

    def detach(self) -> None:
        """Put the frozen layers back into their places."""
        for unet in self._within:
            _restore(unet, set(self._layers.values()))
        self._layers, self._within = {}, []

    def numbered(self) -> dict[int, nn.Parameter]:
        """Every A, then every B."""
        both = enumerate([*self.down.values(), *self.up.values()], self.first_id)
        return {param_id: theta for param_id, theta in both if theta.requires_grad}

    @contextmanager
    def away(self) -> Iterator[None]:
        """The base as it is without the LoRA, for the length of a `with`."""
        scale, self._standing.scale = self._standing.scale, 0.0
        try:
            yield
        finally:
            self._standing.scale = scale

    def merge_(self) -> None:
        """Add the LoRA to the base's weights: no layer computes more than before; int8 weights are packed anew.

        Raises:
            UserError: the weights have 16 levels (int4), between which a LoRA is lost.
        """
        from mep_lightning.quantization import Int4Conv2d, Int4Linear

        if any(isinstance(layer.base_layer, (Int4Linear, Int4Conv2d)) for layer in self._layers.values()):
            raise UserError("a LoRA cannot be merged into int4 weights, whose rounding it drowns in: leave --merge out")
        for layer in self._layers.values():
            layer.merge()

    # -- files ---------------------------------------------------------------------------------------------------------

    def export(self, directory: Path) -> list[Path]:
        """The LoRA for diffusers' `load_lora_weights`, and in kohya's keys for ComfyUI and A1111, both of alpha = rank:
        alpha / rank is in B."""
        self.refuse_empty()
        self.refuse_infinite()
        paths = [Path(directory) / name for name in self.FILES]
        contents = (self._as_peft(), self.metadata()), (self._as_kohya(), self.metadata() | self._kohya_metadata())
        for path, (tensors, metadata) in zip(paths, contents, strict=True):
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata)
        return paths

    def _factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, A, and B with the term's strength in it, fp32 on the CPU."""
        for name in self.names:
            down, up = (part[undotted(name)].detach().float().cpu() for part in (self.down, self.up))
            yield name, down.contiguous(), (up * ((self.alpha or len(down)) / len(down))).contiguous()

    def _as_peft(self) -> dict[str, Tensor]:
        return {
            key: factor
            for name, down, up in self._factors()
            for key, factor in ((f"unet.{name}{DOWN}", down), (f"unet.{name}{UP}", up))
        }

    def _as_kohya(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, down, up in self._factors():
            key = f"lora_unet_{undotted(name)}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
        return tensors

    def _kohya_metadata(self) -> dict[str, str]:
        told = {"ss_network_module": "networks.lora"}
        told |= dict.fromkeys(("ss_network_dim", "ss_network_alpha"), str(self.rank))
        if version := KOHYA_VERSIONS.get(self.family or ""):
            told |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
        return told

    def load_export(self, directory: Path) -> None:
        path = Path(directory) / FILE
        tensors, origin = read_export(Path(directory), FILE)
        names = [key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)]
        pairs = {name.removeprefix("unet."): (tensors.get(name + DOWN), tensors.get(name + UP)) for name in names}
        if not pairs or len(tensors) != 2 * len(pairs) or any(up is None for _, up in pairs.values()):
            raise UserError(f"{path} holds no LoRA of a U-Net in diffusers' keys (unet.….lora_A.weight, lora_B.weight)")
        if any(factor.dim() not in (2, 4) or factor.numel() == 0 for factor in tensors.values()):
            raise UserError(f"{path} holds factors that are no matrices or kernels: export it again")
        ranks = {len(down) for down, _ in pairs.values()}  # type: ignore[arg-type]
        if len(ranks) > 1:
            raise UserError(f"{path} has layers of different ranks ({', '.join(map(str, sorted(ranks)))})")
        (self.rank,), self.alpha, self.targets, self.names = ranks, None, list(pairs), list(pairs)
        self.token = origin.pop("token", self.token)
        self.origin = origin
        for name, (down, up) in pairs.items():
            self.down[undotted(name)], self.up[undotted(name)] = (nn.Parameter(f.float()) for f in (down, up))  # type: ignore

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """A checkpoint may come before `attach`: take the shapes it has."""
        take_shapes(self.down, state_dict, f"{prefix}down.")
        take_shapes(self.up, state_dict, f"{prefix}up.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _restore(unet: nn.Module, layers: Collection[nn.Module]) -> None:
    """Put the frozen layers back into the places of these."""
    from mep_lightning.adapters.lora_layers import KINDS

    kinds = tuple(KINDS.values())
    found = [name for name, part in unet.named_modules() if isinstance(part, kinds)]
    for name in found:
        layer = unet.get_submodule(name)
        if layer in layers:
            path, _, last = name.rpartition(".")
            setattr(unet.get_submodule(path), last, layer.base_layer)


def _inject(unet: nn.Module, names: list[str], rank: int, alpha: float) -> dict[str, LoRALinear | LoRAConv2d]:
    """Put peft's layers into the places named, factors on the meta device; by name, in the U-Net's order.

    (Its own injection moves and casts whatever it meets, which tensors of a rehearsal do not bear.)
    """
    from peft import LoraConfig

    from mep_lightning.adapters.lora_layers import ADAPTER, KINDS

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)  # type: ignore[arg-type]
    layers = {}
    for name in names:
        path, _, last = name.rpartition(".")
        target = unet.get_submodule(name)
        kind = next(ours for theirs, ours in KINDS.items() if isinstance(target, theirs))
        with torch.device("meta"):
            layers[name] = kind(_plain(target), ADAPTER, config=config, r=rank, lora_alpha=alpha).train(target.training)
        layers[name].base_layer = target
        setattr(unet.get_submodule(path), last, layers[name])
    return layers  # type: ignore[return-value]


def _plain(layer: nn.Module) -> nn.Module:
    """A layer of the same sizes: peft makes the factors of a convolution like it, which packed ones do not know."""
    if not isinstance(layer, nn.Conv2d):
        return layer
    plain: Any = nn.Conv2d  # whose padding may be a word as well
    return plain(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )
