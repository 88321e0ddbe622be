"""Full fine-tuning: every weight of the U-Net is trained, as DreamBooth does (arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from mep_lightning.adapters.adapter import Adapter, read_export, take_shapes
from mep_lightning.bases import Base
from mep_lightning.errors import UserError, refuse_unless
from mep_lightning.run_folder import replacing, write_atomically

FILE = "unet/diffusion_pytorch_model.safetensors"


class FullUNet(Adapter):
    """All of the U-Net. Its weights must be fp32: updates of lr 5e-6 are lost in half precision.

    Args:
        token: the word that names the subject in prompts, before the class word; one that the base hardly knows.
    """

    FILES = (FILE,)
    precisions = ("fp32",)
    offloads = ("none",)
    is_perturbed = False

    def __init__(self, token: str = "sks") -> None:
        super().__init__()
        refuse_unless(bool(token.strip()), "FullUNet.token", token, "a word, such as sks")
        self.token = token
        self.weights = nn.ParameterDict()
        self._within: list[nn.Module] = []  # the U-Net, which is no part of the adapter
        self._are_loaded = False  # from a run that trained them

    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        """Train the U-Net's own parameters in their places.

        Raises:
            UserError: they are in another precision, or what was loaded is of another U-Net.
        """
        if base.precision not in self.precisions or base.offload not in self.offloads:
            raise UserError(
                f"FullUNet is the weights themselves, and these are {base.precision} with offload {base.offload}: take "
                "precision fp32 and offload none, or train a LoRA"
            )
        self.move_in(base)
        own = {name.replace(".", "/"): theta for name, theta in base.unet.named_parameters()}
        if self.weights and {k: v.shape for k, v in self.weights.items()} != {k: v.shape for k, v in own.items()}:
            raise UserError(
                f"the weights that were trained are of another U-Net than {base.name}'s: use their own base"
            )
        for name, theta in own.items():
            if name in self.weights and self.weights[name] is not theta:
                theta.data.copy_(self.weights[name].data)
            self.weights[name] = theta.requires_grad_()
        self._within = [base.unet]
        self.remember_origin(base, class_word)

    def detach(self) -> None:
        """The U-Net stays as it was trained, and is frozen."""
        for unet in self._within:
            unet.requires_grad_(False)
        self._within = []

    def stands_in(self, base: Base) -> bool:
        return base.guest is self

    @contextmanager
    def away(self) -> Iterator[None]:
        if self._are_loaded:
            raise UserError("the base's own weights, which drew them, are trained over")
        yield

    def export(self, directory: Path) -> list[Path]:
        """`unet/` in diffusers' layout, for `UNet2DConditionModel.from_pretrained`."""
        self.refuse_infinite()
        path = Path(directory) / FILE
        tensors = {name.replace("/", "."): theta.detach().cpu().contiguous() for name, theta in self.weights.items()}
        for unet in self._within:
            write_atomically(path.with_name("config.json"), unet.to_json_string())  # type: ignore[operator]
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"format": "pt", **self.metadata()})
        return [path]

    def load_export(self, directory: Path) -> None:
        tensors, origin = read_export(Path(directory), FILE)
        self.token = origin.pop("token", self.token)
        self.origin, self._are_loaded = origin, True
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(v.float()) for name, v in tensors.items()}
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """A checkpoint may come before `attach`."""
        self._are_loaded = True
        take_shapes(self.weights, state_dict, f"{prefix}weights.")
        super()._load_from_state_dict(state_dict, prefix, *args)
