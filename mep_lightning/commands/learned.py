"""Opens what was learned, from a run's folder or an exported one, ready to draw pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mep_lightning import PersonalizationModule, defaults
from mep_lightning.adapters import Adapter, FullUNet, LoRA, QuantizationScales, TokenAndLoRA, TokenEmbedding
from mep_lightning.adapters.adapter import STYLE
from mep_lightning.bases import Base, identify
from mep_lightning.bases.load import DTYPES, OFFLOADS, PRECISIONS, QUANTIZED
from mep_lightning.commands.recipes import nearest, read_recipe
from mep_lightning.errors import LONGEST, UserError
from mep_lightning.hollow import Hollow
from mep_lightning.run_folder import RunFolder
from mep_lightning.templates import fill

EXPORTS: dict[str, type[Adapter]] = {
    kind.FILES[0]: kind for kind in (TokenEmbedding, LoRA, FullUNet, QuantizationScales)
}
"""Exported file -> the adapter that reads it; a token and a LoRA side by side belong together."""
KINDS: dict[str, type[Adapter]] = {kind.__name__: kind for kind in EXPORTS.values()} | {"TokenAndLoRA": TokenAndLoRA}
TEXTS = ("model.base", "model.precision", "model.method", "data.path", "data.class_word")
"""Settings that are read here, and that must be text if they are there."""


@dataclass
class Learned:
    """A module whose adapter is the learned one.

    Attributes:
        module: not loaded yet.
        folder: the run, or the folder that holds an export alone; results are written below it.
        settings: config.yaml, where there is one.
        class_word: what the subject is, where known; None of a style.
        values: the defaults of its method and base, such as guidance and sampling_steps.
        device: where it will be.
        merged: whether a LoRA is added to the base's weights, which then draw along one path.
        two_paths: whether a LoRA that was trained around a hollow draws along its two paths.
    """

    module: PersonalizationModule
    folder: RunFolder
    settings: dict[str, Any]
    class_word: str | None
    values: dict[str, Any]
    device: torch.device
    merged: bool = False
    two_paths: bool = True

    def load(self, prompts: Sequence[str] = ()) -> Base:
        """Load the base with the adapter in it, ready to draw these prompts.

        Raises:
            UserError: the adapter cannot be merged.
        """
        lora = _lora(self.module.adapter)
        if self.merged and lora is None:
            raise UserError(f"--merge is for a LoRA, and {self.folder.root} has learned none; leave it out.")
        if not self.two_paths and self.module.hollow is None:
            raise UserError(
                f"--one-path is for a LoRA that was trained around a hollow, and {self.folder.root} has learned none; "
                "leave it out."
            )
        if self.merged:
            self.module.offload = "none"  # streamed weights would come without what is added to them
        self.module.will_draw(prompts)
        base = self.module.load(self.device)
        self.module.eval()
        if not self.two_paths or self.merged:
            self.module.hollow = None
        if self.merged and lora is not None:
            lora.merge_()
        return base

    @property
    def token(self) -> str:
        """The learned token's name."""
        return str(self.module.adapter.token)

    @property
    def base(self) -> Base:
        """The loaded base."""
        assert self.module.base is not None
        return self.module.base

    def is_in(self, text: str) -> bool:
        """Whether a prompt names the subject, as in "<sks>'s hat"; a word such as sks is not in "desks"."""
        return re.search(rf"(?<!\w){re.escape(self.token)}(?!\w)", text) is not None

    def prompt(self, template: str) -> str:
        """A prompt with the subject where `{}` (or `{0} {1}`) stands.

        Raises:
            UserError: the prompt names a token that was not learned.
        """
        text = fill(template, self.module.adapter.phrase(self.class_word), self.class_word)
        for name in re.findall(r"<[^<>\s]+>", text):
            if name != self.token:
                guess = nearest(name, [self.token])
                mend = "write" if guess is None else "did you mean"
                raise UserError(
                    f"the prompt {template!r} names {name}, which {self.folder.root} has not learned; "
                    f"{mend} {self.token}{'.' if guess is None else '?'}"
                )
        return text


def open_learned(
    folder: str | Path,
    base: str | None = None,
    precision: str | None = None,
    class_word: str | None = None,
    device: str = "auto",
    scale: float = 1.0,
) -> Learned:
    """Finds what a run has learned, and the base that it belongs to.

    Args:
        folder: a run's folder, its `adapter/`, or another one that holds an export; the run's config.yaml says the
            base, and without one the export itself.
        base: instead of what they say.
        precision: instead of what they say.
        class_word: instead of what they say.
        device: "auto" takes a GPU where there is one.
        scale: of a LoRA's strength.

    Raises:
        UserError: nothing learned is there, or the base is not known.
    """
    opened = RunFolder(Path(folder).expanduser())
    if not opened.root.is_dir():
        raise UserError(f"{opened.root} does not exist; give --run the folder of a run or of an export.")
    run = _run_of(opened)
    settings = _settings(run.config)
    said = settings.get("model") or {}
    weights = _newest_weights(opened)
    adapter = _adapter(run, weights, said)
    if weights.suffix == ".safetensors":
        adapter.load_export(weights.parents[len(Path(adapter.FILES[0]).parts) - 1])
    origin = {} if settings else adapter.origin
    base = base or said.get("base") or origin.get("base")
    if base is None:
        raise UserError(f"{run.root}: no config.yaml says its base; add --base tiny, a folder, file or hub id.")
    kept_in: Any = precision or said.get("precision") or origin.get("precision") or "fp32"
    if kept_in not in PRECISIONS:
        where = f"{run.config}: " if settings else f"{weights}: "
        raise UserError(f"{where}model.precision is {kept_in!r}; put the file back, or add --precision.")
    offload: Any = said.get("offload") if said.get("offload") in OFFLOADS else "none"
    activations: Any = said.get("activations") if kept_in in QUANTIZED and said.get("activations") in DTYPES else "auto"
    module = PersonalizationModule(
        base, kept_in, adapter=adapter, method=said.get("method"), activations=activations, offload=offload
    )
    if weights.suffix != ".safetensors":
        _load_checkpoint(weights, module)
    class_word = class_word or _class_word(settings) or origin.get("class_word")
    module.class_word = class_word
    said_style = (settings.get("data") or {}).get("templates") == STYLE
    adapter.is_style = said_style if settings else origin.get("concept") == STYLE
    values = defaults.lookup(module.method, identify(base).family, module.precision)
    lora = _lora(adapter)
    if lora is not None:
        lora.scale = scale
        fraction = _hollowed(settings) or _share(adapter.origin.get("hollowed"), weights)
        module.hollow = None if fraction is None else Hollow(fraction, samples=1)
    elif scale != 1:
        raise UserError(f"--lora-scale is for a LoRA, and {run.root} has learned none; leave it out.")
    return Learned(module, run, settings, class_word, values, pick_device(device))


def _lora(adapter: Adapter) -> LoRA | None:
    """The LoRA that an adapter is or has."""
    return next((part for part in adapter.parts if isinstance(part, LoRA)), None)


def _hollowed(settings: dict[str, Any]) -> float | None:
    """The share of the U-Net that was cut out in training."""
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith(".HollowedActivations"):
            arguments = callback.get("init_args")
            fraction = arguments.get("fraction") if isinstance(arguments, dict) else None
            return fraction if isinstance(fraction, float) and 0 < fraction < 1 else None
    return None


def _share(said: str | None, path: Path) -> float | None:
    """The same, as an export says it.

    Raises:
        UserError: it is no share.
    """
    if said is None:
        return None
    try:
        fraction = float(said)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(f"{path} says that {said[:LONGEST]!r} of its U-Net was cut out: it is damaged, export it again")
    return fraction


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not on this machine; use cpu or auto.") from None
    return device


def _run_of(folder: RunFolder) -> RunFolder:
    """The run that a folder belongs to: the one above it for a run's `adapter/`, or else itself."""
    above = RunFolder(folder.root.resolve().parent)
    is_part = above.adapter == folder.root.resolve() and above.config.is_file()
    return above if is_part and not folder.config.is_file() else folder


def _settings(path: Path) -> dict[str, Any]:
    """config.yaml, where there is one.

    Raises:
        UserError: it cannot be read, or a setting that is needed here is of the wrong kind.
    """
    settings = read_recipe(path) if path.is_file() else {}
    for key in TEXTS:
        section, name = key.split(".")
        value = settings.get(section, {}).get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {key} is {value!r}, not text; put the run's file back.")
    return settings


def _class_word(settings: dict[str, Any]) -> str | None:
    data = settings.get("data") or {}
    if data.get("class_word") or not settings or data.get("path") or data.get("templates") == STYLE:
        return data.get("class_word")
    from mep_lightning.tiny import sample_photos

    return sample_photos()[1]


def _exports(run: RunFolder) -> list[Path]:
    return [path for folder in (run.adapter, run.root) for name in EXPORTS if (path := folder / name).is_file()]


def _adapter(run: RunFolder, weights: Path, said: dict[str, Any]) -> Adapter:
    """An empty adapter of the kind that was trained."""
    if part := said.get("adapter"):
        try:
            adapter = _made(part)
        except (KeyError, TypeError, AttributeError):
            adapter = None
        if not isinstance(adapter, Adapter):
            raise UserError(
                f"{run.config}: model.adapter is none of {', '.join(KINDS)} with its settings; put the run's file back."
            )
        return adapter
    beside = {path.name for path in weights.parent.iterdir()}
    if {TokenEmbedding.FILES[0], LoRA.FILES[0]} <= beside:
        return TokenAndLoRA()
    name = next((name for name in EXPORTS if str(weights).endswith(name)), TokenEmbedding.FILES[0])
    return EXPORTS[name]()


def _made(part: Any) -> Any:
    """An adapter from its settings, in which others may stand; nothing else that a settings file names is called."""
    if not isinstance(part, dict) or "class_path" not in part:
        return part
    settings = {key: _made(value) for key, value in (part.get("init_args") or {}).items()}
    return KINDS[str(part["class_path"]).rpartition(".")[2]](**settings)


def _newest_weights(run: RunFolder) -> Path:
    """The export, or the checkpoint of a run that was killed after its last export."""
    candidates = [*_exports(run), *([run.last_checkpoint] if run.last_checkpoint.is_file() else [])]
    if not candidates:
        names = ", ".join(EXPORTS)
        raise UserError(
            f"{run.root} holds none of {names} and {run.last_checkpoint.relative_to(run.root)}; "
            "give the folder of a run that has trained, or of an export."
        )
    return max(candidates, key=lambda path: path.stat().st_mtime)


def _load_checkpoint(path: Path, module: PersonalizationModule) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); train the run again.") from error
    if missing := [name for name in module.state_dict() if name not in state]:
        raise UserError(f"{path} lacks {missing[0]}: it is damaged or of another adapter; train the run again.")
    module.load_state_dict(state)
