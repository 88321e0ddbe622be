"""Opens what was learned, from a run's folder or an exported one, ready to draw pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mep_lightning import PersonalizationModule, defaults
from mep_lightning.adapters import Adapter, TokenEmbedding
from mep_lightning.bases import identify
from mep_lightning.commands.recipes import nearest, read_recipe
from mep_lightning.errors import UserError
from mep_lightning.run_folder import RunFolder

EXPORTS = {"learned_embeds.safetensors": TokenEmbedding}
"""Exported file -> the adapter that reads it."""


@dataclass
class Learned:
    """A module whose adapter is the learned one.

    Attributes:
        module: loaded; `prompt_embeds` and `evaluation.generate` work.
        folder: what it was opened from; results are written below it.
        settings: config.yaml, where there is one.
        class_word: what the subject is, where known.
        values: the defaults of its method and base, such as guidance and sampling_steps.
    """

    module: PersonalizationModule
    folder: RunFolder
    settings: dict[str, Any]
    class_word: str | None
    values: dict[str, Any]

    @property
    def token(self) -> str:
        """The learned token's name."""
        return str(self.module.adapter.token)

    def fill(self, prompt: str) -> str:
        """A prompt with `{}` replaced by the subject.

        Raises:
            UserError: the prompt names a token that was not learned.
        """
        text = prompt.replace("{}", self.module.adapter.phrase(self.class_word))
        for name in re.findall(r"<[^<>\s]+>", text):
            if name != self.token:
                guess = nearest(name, [self.token])
                mend = "write" if guess is None else "did you mean"
                raise UserError(
                    f"the prompt {prompt!r} names {name}, which {self.folder.root} has not learned; {mend} {self.token}"
                    f"{'.' if guess is None else '?'}"
                )
        return text


def open_learned(
    folder: str | Path,
    base: str | None = None,
    precision: str | None = None,
    class_word: str | None = None,
    device: str = "auto",
) -> Learned:
    """Loads the base of a run and puts the learned adapter in.

    Args:
        folder: a run's folder, or one that holds an export; a config.yaml in it, or above it, says the base.
        base: instead of what config.yaml says.
        precision: instead of what config.yaml says.
        class_word: instead of what config.yaml says.
        device: "auto" takes a GPU where there is one.

    Raises:
        UserError: nothing learned is there, or the base is not known.
    """
    run = RunFolder(Path(folder).expanduser())
    if not run.root.is_dir():
        raise UserError(f"{run.root} does not exist; give --run the folder of a run or of an export.")
    settings = _settings(run)
    said = settings.get("model") or {}
    base = base or said.get("base")
    if base is None:
        raise UserError(f"{run.root} holds no config.yaml that says its base; add --base tiny, a folder or a hub id.")
    adapter = _adapter(run, said)
    kept_in: Any = precision or said.get("precision") or "fp32"
    module = PersonalizationModule(base, kept_in, adapter=adapter, method=said.get("method"))
    _read_weights(run, module)
    class_word = class_word or _class_word(settings)
    module.class_word = class_word
    values = defaults.lookup(module.method, identify(base).family, module.precision)
    module.load(pick_device(device))
    module.eval()
    return Learned(module, run, settings, class_word, values)


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


def _settings(run: RunFolder) -> dict[str, Any]:
    """config.yaml of the folder, or of the run above its `adapter/`."""
    for path in (run.config, run.root.resolve().parent / run.config.name):
        if path.is_file():
            return read_recipe(path)
    return {}


def _class_word(settings: dict[str, Any]) -> str | None:
    data = settings.get("data") or {}
    if data.get("class_word") or not settings or data.get("path"):
        return data.get("class_word")
    from mep_lightning.tiny import sample_photos

    return sample_photos()[1]


def _exports(run: RunFolder) -> list[Path]:
    return [path for folder in (run.adapter, run.root) for name in EXPORTS if (path := folder / name).is_file()]


def _adapter(run: RunFolder, said: dict[str, Any]) -> Adapter:
    """An empty adapter of the kind that was trained."""
    part = said.get("adapter")
    if part:
        kinds = {kind.__name__: kind for kind in EXPORTS.values()}  # nothing else that a settings file names is called
        try:
            return kinds[str(part["class_path"]).rpartition(".")[2]](**(part.get("init_args") or {}))
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{run.config}: model.adapter is none of {', '.join(kinds)} with its settings; put the run's file back."
            ) from None
    return next((EXPORTS[path.name]() for path in _exports(run)), TokenEmbedding())


def _read_weights(run: RunFolder, module: PersonalizationModule) -> None:
    """Takes the export, or the checkpoint of a run that was killed after its last export."""
    candidates = [*_exports(run), *([run.last_checkpoint] if run.last_checkpoint.is_file() else [])]
    if not candidates:
        names = " or ".join(EXPORTS)
        raise UserError(
            f"{run.root} holds neither {names} nor {run.last_checkpoint.relative_to(run.root)}; "
            "give the folder of a run that has trained, or of an export."
        )
    newest = max(candidates, key=lambda path: path.stat().st_mtime)
    if newest.suffix == ".safetensors":
        module.adapter.load_export(newest.parent)
        return
    try:
        state = torch.load(newest, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise UserError(f"{newest} cannot be read ({type(error).__name__}); train the run again.") from error
    if missing := [name for name in module.state_dict() if name not in state]:
        raise UserError(f"{newest} lacks {missing[0]}: it is damaged or of another adapter; train the run again.")
    module.load_state_dict(state)
