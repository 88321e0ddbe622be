"""What every adapter answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mep_lightning.bases import Base
from mep_lightning.errors import LONGEST, UserError, reason
from mep_lightning.estimators.perturbation import HERE, Members

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What exported values may be."""
PREFIX = "mep."
"""What our keys in a file's metadata start with."""
STYLE = "style"
"""What `origin` says of a style."""


class Adapter(nn.Module, ABC):
    """The trained part. Its parameters stay fp32 whatever precision a Trainer asks for.

    (In half precision an update of lr 5e-3 to a token is mostly rounded away, and Adam's second moment underflows.)

    Attributes:
        token: the word that names the subject in prompts.
        origin: what it belongs to, as far as known: "base" (a hub id, a folder's absolute path or tiny), "precision",
            "class_word", and of a style "concept". `attach` fills it in, exports keep it.
        is_style: whether it is trained on what photos of unlike things share; prompts need no class word then.
    """

    FILES: ClassVar[tuple[str, ...]] = ()
    """What `export` writes; the first is what `load_export` reads."""
    AUTO: ClassVar[dict[str, str]] = {}
    trains_text: ClassVar[bool] = False
    """Whether text encoders are needed in every step; others see each prompt once, and leave memory."""
    precisions: ClassVar[Sequence[str]] = ("fp32", "bf16", "fp16", "int8", "int4")
    """Those of the base that it goes with."""
    offloads: ClassVar[Sequence[str]] = ("none", "stream")
    """Where the base's weights may be."""
    is_perturbed: ClassVar[bool] = True
    """Whether zeroth-order estimators can move it."""
    token: str

    def __init__(self) -> None:
        super().__init__()
        self.origin: dict[str, str] = {}
        self.is_style = False

    @abstractmethod
    def attach(self, base: Base, class_word: str | None = None, without: Collection[nn.Module] = ()) -> None:
        """Create what is trained for this base, or check that what was loaded fits it.

        Args:
            base: to personalise.
            class_word: what the subject is.
            without: modules that are to be left as they are, with all that is in them.
        """

    def detach(self) -> None:
        """Leave the base as it was before `attach`."""

    def stands_in(self, base: Base) -> bool:
        """Whether a base computes with it; a token, which stands in prompts, goes with any."""
        return True

    @abstractmethod
    def export(self, directory: Path) -> list[Path]:
        """Write the files that other programs load, each whole or not at all (`run_folder.replacing`); their paths."""

    @abstractmethod
    def load_export(self, directory: Path) -> None:
        """Read back what `export` wrote, `origin` included."""

    @property
    def parts(self) -> Sequence[Adapter]:
        """The adapters that this one is made of: itself."""
        return (self,)

    def phrase(self, class_word: str | None) -> str:
        """How prompts name the subject: "<sks> ball"."""
        return f"{self.token} {class_word}" if class_word else self.token

    def numbered(self) -> dict[int, nn.Parameter]:
        """What is trained under parameter ids that stay the same whatever else is frozen."""
        return {param_id: theta for param_id, theta in enumerate(self.parameters()) if theta.requires_grad}

    def tokens(self, members: Tensor | Members | None = None) -> dict[str, Tensor]:
        """What `encode_prompts` must know: name -> vectors [n, D], or [V, n, D] of members."""
        return {}

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Layers of the base in which members differ."""
        return ()

    @contextmanager
    def at(self, members: Members) -> Iterator[None]:
        """Let those layers compute for V members, whose rows lie one after the other."""
        yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """The base as it is without what was trained, for the length of a `with`; a token is away where no prompt
        names it.

        Raises:
            UserError: the base's own weights were trained, and are not kept.
        """
        yield

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer; a group may have an `lr` of its own."""
        return [{"params": list(self.numbered().values())}]

    def refuse_infinite(self) -> None:
        """Raise UserError unless all that is trained is finite."""
        if not all(theta.isfinite().all() for theta in self.numbered().values()):
            raise UserError(f"{self.token} is no longer finite, so it is not exported: lower lr, or raise a mu")

    def metadata(self) -> dict[str, str]:
        """`origin` and the token, as an exported file keeps them."""
        return {f"{PREFIX}{key}": value for key, value in (self.origin | {"token": self.token}).items()}

    def move_in(self, base: Base) -> None:
        """Become what stands in the base's layers; whatever stood there leaves."""
        if base.guest is not None and base.guest is not self:
            base.guest.detach()
        base.guest = self

    def remember_origin(self, base: Base, class_word: str | None) -> None:
        self.origin = {"base": base.address, "precision": base.precision}
        if class_word:
            self.origin["class_word"] = class_word
        if self.is_style:
            self.origin["concept"] = STYLE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow moves to a device, refuse casts."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)  # never through half precision

        super()._apply(move, recurse)
        return self


class LayerAdapter(Adapter):
    """An adapter that stands in layers of the U-Net, which read from one place who asks (`Members`).

    Attributes:
        names: of the layers that it is for, dotted, in the U-Net's order or an export's; it may have left them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._layers: dict[str, Any] = {}
        self._standing: Any = None

    def stands_in(self, base: Base) -> bool:
        return base.guest is self

    def refuse_empty(self) -> None:
        """Raise UserError where there is nothing yet that an export could hold."""
        if not self.names:
            raise UserError(f"there is nothing to export, as the {type(self).__name__} has not met a base yet: fit it")

    @property
    def layers(self) -> list[nn.Module]:
        return list(self._layers.values())

    @contextmanager
    def at(self, members: Members) -> Iterator[None]:
        self._standing.members = members
        try:
            yield
        finally:
            self._standing.members = HERE


def take_shapes(part: nn.ParameterDict, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Fill what is empty from a checkpoint that comes before `attach`, whose keys begin with a prefix."""
    if not part:
        for key, value in state_dict.items():
            if key.startswith(prefix):
                part[key.removeprefix(prefix)] = nn.Parameter(value.clone().float())


def in_order(part: nn.ParameterDict, names: list[str]) -> nn.ParameterDict:
    """Parameters in the order of the layers that are named, which a file that they came from does not keep: by it they
    are numbered, and by their numbers perturbed and updated."""
    if not part or list(part) == names:
        return part
    found = nn.ParameterDict()
    for name in names:
        found[name] = part[name]
    return found


def read_export(directory: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an exported file, and our own keys of its metadata.

    Raises:
        UserError: it is not there, damaged, or holds values that are no finite numbers.
    """
    path = directory / name
    if not path.is_file():
        raise UserError(f"{directory} holds no {name}: give the folder of a finished run or of an export")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
    except Exception as error:  # a header may name kinds of numbers that torch lacks, and sizes that no memory holds
        raise UserError(f"{path} is damaged ({reason(error)}): export it again") from None
    for key, value in tensors.items():
        if value.dtype not in FLOATS:
            raise UserError(f"{path} holds {key[:LONGEST]} as {value.dtype}, not as floating point: export it again")
        if not value.isfinite().all():
            raise UserError(f"{path} holds values that are not finite: export it again")
    return tensors, {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
