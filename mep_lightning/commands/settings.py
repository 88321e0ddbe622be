"""The settings of a run: what `auto` becomes, what cannot work, what a resumed run may not change, and config.yaml."""

from __future__ import annotations

import enum
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Trainer

from mep_lightning import defaults
from mep_lightning.advice import ALLOWED_TRAINER_PRECISIONS
from mep_lightning.bases import identify
from mep_lightning.commands.keeping import RunLog
from mep_lightning.commands.request import say
from mep_lightning.data import Batches, SubjectData
from mep_lightning.errors import UserError, reason
from mep_lightning.module import PersonalizationModule
from mep_lightning.run_folder import RunFolder, write_atomically

AUTO_KEYS = {
    **{f"model.{setting}": column for setting, column in PersonalizationModule.AUTO.items()},
    "trainer.max_steps": "max_steps",
    "samples.steps": "sampling_steps",
    "samples.guidance": "guidance",
    "samples.batch_size": "sampling_batch",
}
"""Setting -> its column in the table of defaults; those of parts are in their classes' `AUTO`."""
PRECISION_SYNONYMS = {"32": "32-true", "bf16": "bf16-mixed", "None": "32-true"}
FREE_TO_CHANGE = (
    "data.repeats",
    "model.checkpointing",
    "model.compile",
    "model.cuda_graph",
    "model.members_at_once",
    "model.offload",
)
"""What a resumed run may change: an epoch's length draws nothing; the others change memory and speed, and
`model.compile` and `model.members_at_once` also the last bits of what is computed."""
NOT_HERE = {
    "max_epochs": "an epoch of photos never ends; set trainer.max_steps, or data.repeats for epochs that do",
    "default_root_dir": "a run keeps everything in a folder of its own; name that one with --run DIR",
    "enable_checkpointing": "a run is resumed from its checkpoint; leave it out, and say how often by checkpoint.every",
    "gradient_clip_val": "gradients are not clipped; lower model.lr (a step whose gradient is not finite is skipped)",
    "accumulate_grad_batches": "every batch is a step here; raise data.batch_size, or a zeroth-order model.estimator.n",
}
"""What of the Trainer could not come true here -> why, and the mend."""
LARGEST_SEED = 2**32 - 1
"""What numpy takes."""


def refuse_impossible(config: Namespace, where: Callable[[str], str]) -> None:
    """Refuses settings that Lightning would rewrite before any module can see them, or answer with a traceback.

    Args:
        config: everything asked for.
        where: how a sentence about a key begins, such as with the file that holds it.

    Raises:
        UserError: 16-bit precision, whose scaled losses spoil hand-made gradients, no step to train, an epoch without
            end to count, a part of the Trainer that a run has no use for, or a seed out of range.
    """
    precision = str(config.trainer.precision)
    if PRECISION_SYNONYMS.get(precision, precision) not in ALLOWED_TRAINER_PRECISIONS:
        why = ", as its loss scaling spoils hand-made gradients" if precision in ("16", "16-mixed") else ""
        raise UserError(
            f"{where('trainer.precision')}trainer.precision {precision} cannot train this{why}; choose one of "
            f"{', '.join(ALLOWED_TRAINER_PRECISIONS)}, and model.precision for the frozen base."
        )
    steps = config.trainer.max_steps
    if isinstance(steps, int) and steps < 1 and steps != -1:
        raise UserError(
            f"{where('trainer.max_steps')}trainer.max_steps is {steps}; use 1 or more, -1 (no end) or auto."
        )
    epochs = config.trainer.max_epochs
    if epochs is not None and epochs < 1 and epochs != -1:
        raise UserError(f"{where('trainer.max_epochs')}trainer.max_epochs is {epochs}; use 1 or more, or -1 (no end).")
    if config.trainer.limit_train_batches == 0:
        raise UserError(f"{where('trainer.limit_train_batches')}trainer.limit_train_batches is 0; use 1 or more.")
    asked = {
        "max_epochs": epochs not in (None, -1) and _never_ends(config),
        "default_root_dir": config.trainer.default_root_dir is not None,
        "enable_checkpointing": config.trainer.enable_checkpointing is False,
        "gradient_clip_val": bool(config.trainer.gradient_clip_val),
        "accumulate_grad_batches": config.trainer.accumulate_grad_batches != 1,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        said = json.dumps(_plain(config.trainer[name]), ensure_ascii=False)
        raise UserError(f"{where(f'trainer.{name}')}trainer.{name} is {said}, and {NOT_HERE[name]}.")
    seed = config.seed_everything
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{where('seed_everything')}seed_everything is {seed}; use 0 to {LARGEST_SEED}.")


def _never_ends(config: Namespace) -> bool:
    """Whether an epoch goes on for ever."""
    return config.data.repeats is None and not isinstance(config.trainer.limit_train_batches, int)


def refuse_nulls(config: Namespace, where: Callable[[str], str]) -> None:
    """Refuses null where no setting may be so: the parser takes it for anything.

    Args:
        config: everything asked for.
        where: as for `refuse_impossible`.

    Raises:
        UserError: a setting of model, data or a part of ours is null, and is none that may be left out.
    """
    found = [("model", PersonalizationModule, config.model), ("data", SubjectData, config.data)]
    found += [("", pkgutil.resolve_name(part["class_path"]), part["init_args"]) for part in _parts(config)]
    for section, kind, settings in found:
        if not kind.__module__.startswith("mep_lightning."):
            continue
        for name, parameter in inspect.signature(kind).parameters.items():
            said = str(parameter.annotation)
            is_free = parameter.annotation is parameter.empty or re.search(r"\b(None|Any|Optional)\b", said)
            if name in settings and settings[name] is None and not is_free:
                begin = where(f"{section}.{name}") if section else ""
                raise UserError(f"{begin}{section or kind.__name__}.{name} is null; give it a value, or leave it out.")


def count_epochs_in_steps(trainer: Trainer, data: SubjectData) -> str:
    """Makes the last epoch's end the last step, as all that a run tells of its end is told in steps.

    Returns:
        The setting that the run ends by.
    """
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs or -1
    if epochs == -1 or (data.repeats is None and isinstance(limit, float)):
        return "trainer.max_steps"
    length = limit if data.repeats is None else len(Batches(data))
    steps = epochs * int(min(length, limit) if isinstance(limit, int) else length * limit)
    if steps < 1 or 0 < trainer.max_steps <= steps:
        return "trainer.max_steps"
    trainer.fit_loop.epoch_loop.max_steps = steps
    return "trainer.max_epochs"


def fill_in_auto(config: Namespace) -> None:
    """Replaces every `auto` that depends on the base by the method's own value, in place.

    Raises:
        UserError: the method is unknown, or has no value for a setting that is `auto`.
    """
    info = identify(config.model.base)
    values = defaults.lookup(_method(config), info.family, config.model.precision, config.model.activations)
    if config.data.resolution == "auto":
        config.data.resolution = info.resolution

    def value(setting: str, column: str) -> Any:
        return defaults.value(values, column, setting, config.model.method)

    for key, column in AUTO_KEYS.items():
        if config.get(key) == "auto":
            config[key] = value(key, column)
    for part in _parts(config):
        kind = pkgutil.resolve_name(part["class_path"])
        for setting, column in getattr(kind, "AUTO", {}).items():
            if part["init_args"].get(setting) == "auto":
                part["init_args"][setting] = value(f"{setting} of {kind.__name__}", column)


def refuse_endless_decay(config: Namespace) -> None:
    """A learning rate that falls to 0 at the last step needs one.

    Raises:
        UserError: there is none.
    """
    trainer = config.trainer
    endless = trainer.max_steps == -1 and (trainer.max_epochs == -1 or _never_ends(config))
    if endless and config.model.lr_scheduler != "constant":
        raise UserError(
            f"model.lr_scheduler is {config.model.lr_scheduler}, and trainer.max_steps -1 is no end to run to; give it "
            "an end, or set model.lr_scheduler constant."
        )


def make_absolute(config: Namespace) -> None:
    """Makes the folders in the settings independent of where `mep` was called, so that a run resumes from anywhere."""
    if config.data.path is not None:
        config.data.path = str(Path(config.data.path).expanduser().absolute())
    if config.model.base != "tiny" and Path(config.model.base).expanduser().exists():
        config.model.base = str(Path(config.model.base).expanduser().absolute())
    for part in _parts(config.trainer.callbacks):
        if part["class_path"].startswith("mep_lightning.") and part["init_args"].get("folder") is not None:
            part["init_args"]["folder"] = str(Path(part["init_args"]["folder"]).expanduser().absolute())


def refuse_changes(before: Namespace, now: Namespace, run: RunFolder) -> None:
    """A resumed run goes on as it began: what is learned, and from what, stays; Trainer and callbacks may change.

    Args:
        before: what the run's config.yaml says.
        now: what is asked for.
        run: named in the message.

    Raises:
        UserError: a setting of model or data differs.
    """
    was, is_now = (
        dict(leaf for part in ("model", "data") for leaf in flat(part, config[part].as_dict()))
        for config in (before, now)
    )
    for key in {**was, **is_now}:
        old, new = was.get(key), is_now.get(key)
        moved = key == "data.path" and old is not None and new is not None
        if old != new and not moved and key not in FREE_TO_CHANGE:
            raise UserError(
                f"{key} is {json.dumps(new, ensure_ascii=False)}, but {run.root} was begun with "
                f"{json.dumps(old, ensure_ascii=False)}; leave it out, or start a new run with it."
            )


def flat(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys as users write them, each with its value; a part's own key has its class's name."""
    if not isinstance(node, dict):
        yield key, _plain(node)
        return
    if "class_path" in node:
        yield key, node["class_path"].rpartition(".")[2]
        node = node.get("init_args") or {}
    for name, value in node.items():
        yield from flat(f"{key}.{name}", value)


def _method(config: Namespace) -> str:
    """The method whose defaults hold: the recipe's word, or what the parts amount to."""
    if config.model.method is None:
        parts = {
            "adapter": "adapters.TokenEmbedding",
            "estimator": "estimators.Backprop",
            "selector": None,
            "subspace": None,
        }
        kinds = [_kind(config.model[key], default) for key, default in parts.items()]
        config.model.method = defaults.method_of(*kinds)
    return str(config.model.method)


def _kind(part: Any, default: str | None) -> Any:
    """A part's class, as its settings or the default (a name in this package) name it."""
    path = part["class_path"] if part else default and f"mep_lightning.{default}"
    return path and pkgutil.resolve_name(path)


def _parts(node: Any) -> Iterator[Any]:
    """Every `class_path` with its `init_args` in a configuration."""
    if isinstance(node, list):
        children = node
    elif isinstance(node, (Namespace, dict)):
        if node.get("class_path") and node.get("init_args") is not None:
            yield node
        children = list(vars(node).values() if isinstance(node, Namespace) else node.values())
    else:
        return
    for child in children:
        yield from _parts(child)


def save_config(config: Namespace, run: RunFolder) -> None:
    """Writes config.yaml: every setting of the run, readable by `--config` and by `--resume`."""
    settings = _settings(config)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(run.config, f"# Written by mep fit; carry on with: mep fit --run {run.root} --resume\n{text}")


def hyperparameters(config: Namespace) -> dict[str, Any]:
    """The same settings for an experiment logger: by dotted key, those of callbacks by their class's name."""
    settings = _settings(config)
    settings["trainer"].pop("logger", None)  # may hold a key to where others read these
    found: dict[str, Any] = {}
    for section, node in settings.items():
        for key, value in flat(section, node):
            items = value if isinstance(value, list) else []
            parts = [item for item in items if isinstance(item, dict) and "class_path" in item]
            for part in parts:
                found.update(flat(f"{key}.{part['class_path'].rpartition('.')[2]}", part))
            if not parts:
                found[key] = value
    return found


def tell_settings(trainer: Trainer, config: Namespace) -> None:
    """Gives the settings to the loggers that the user has asked for."""
    for logger in trainer.loggers if trainer.enable_autolog_hparams else ():
        try:
            if not isinstance(logger, RunLog):
                logger.log_hyperparams(hyperparameters(config))
        except Exception as error:  # some take no other value for what they were told before, as when a run is resumed
            say(f"Note: {type(logger).__name__} does not take the settings ({reason(error)}); config.yaml has them.")


def _settings(config: Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = _plain(config.as_dict())
    settings.pop("config", None)
    settings["trainer"].pop("default_root_dir", None)  # the folder may be moved
    return settings


def _plain(node: Any) -> Any:
    """What YAML can hold."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple, set)):
        return [_plain(item) for item in node]
    if isinstance(node, enum.Enum):
        return _plain(node.value)
    return node if node is None or isinstance(node, (bool, int, float, str)) else str(node)
