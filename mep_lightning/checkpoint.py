"""What a checkpoint of a `PersonalizationModule` says of its run, and which run may go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mep_lightning.errors import CheckpointError, UserError

IDENTITY = ("base", "precision", "method", "seed")
"""What decides which draws and which weights a step sees."""
SETTINGS = ("activations", "lr", "lr_scheduler", "betas", "eps", "weight_decay", "optimizer", "low_resolution")
"""How the module steps."""
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")
"""What a learning rate's schedule keeps for each of its optimizer's groups."""


def describe(module: Any) -> dict[str, Any]:
    """What a checkpoint keeps beside trainables and optimiser, as plain values and the subspace's tensors.

    Raises:
        UserError: a trained value is not finite: the last checkpoint is worth more than this one.
    """
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{name} is no longer finite, so no checkpoint is written: lower lr, or raise a mu")
    return {
        **_identity(module),
        "adapter": type(module.adapter).__name__,
        "class_word": module.class_word,
        "settings": _settings(module),
        "subspace": module.subspace.state_dict() if module.subspace else None,
        "horizon": module.horizon,
        "hollow": _hollow(module),
        "estimators": [one.state_dict() for one in module.estimators],
        "skipped": [module.skipped.total, module.skipped.in_a_row],
    }


def refuse_another_run(checkpoint: dict[str, Any], module: Any) -> None:
    """Check that a checkpoint is complete, and that this module trains on what it trained on, as it did.

    Settings of the step are compared where a Trainer is to go on with them; reading a checkpoint needs none.

    Raises:
        CheckpointError: something differs or is missing; the message names it.
    """
    saved = checkpoint.get("mep")
    if not isinstance(saved, dict):
        raise CheckpointError("the checkpoint has no key 'mep': it was not written by PersonalizationModule")
    for key in (*IDENTITY, "settings", "subspace"):
        if key not in saved:
            raise CheckpointError(f"the checkpoint lacks mep.{key}: it is damaged, start from another one")
    _compare(saved, _identity(module))
    mine = type(module.adapter).__name__
    if saved.get("adapter", mine) != mine:  # else a LoRA's values would go nowhere in a module that trains a token
        raise CheckpointError(
            f"the checkpoint holds a {saved['adapter']}, and this module trains a {mine}: give it the adapter that "
            "config.yaml names, or open what was learned with mep_lightning.open_learned"
        )
    if module._trainer is not None:
        told = {"activations": "auto", "optimizer": "adam"} | saved["settings"]
        own = {key: value for key, value in _settings(module).items() if key in told or not key.startswith("adapter.")}
        _compare(told, own)
        if saved.get("hollow") != _hollow(module):
            raise CheckpointError(
                f"the checkpoint was trained {_around(saved.get('hollow'))}, not {_around(_hollow(module))}: set "
                "HollowedActivations likewise, fraction and samples"
            )
        if (saved["subspace"] is None) != (module.subspace is None):
            raise CheckpointError(
                f"the checkpoint was trained with{'out' if module.subspace else ''} model.subspace: resume likewise"
            )
    own = module.state_dict()
    missing = [name for name in own if name not in checkpoint["state_dict"]]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}: it is damaged or of another adapter")
    for name, value in own.items():
        shape = checkpoint["state_dict"][name].shape
        if shape != value.shape:
            raise CheckpointError(
                f"the checkpoint's {name} is {list(shape)}, this run's {list(value.shape)}: resume with its adapter"
            )


def part_of(state: dict[str, Any], number: int) -> dict[str, Any]:
    """Of the trainables of a batch of subjects those of one, by the names that they have alone."""
    prefix = f"subjects.{number}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def split(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """A checkpoint of `SubjectBatch` as one of every subject's own, from which it goes on alone."""
    (optimizer,) = checkpoint["optimizer_states"]
    found = []
    for number, (own, group) in enumerate(zip(checkpoint["mep"]["subjects"], optimizer["param_groups"], strict=True)):
        state = {i: optimizer["state"][p] for i, p in enumerate(group["params"]) if p in optimizer["state"]}
        schedules = [
            {key: [value[number]] if key in PER_GROUP else value for key, value in one.items()}
            for one in checkpoint["lr_schedulers"]
        ]
        part = {
            "state_dict": part_of(checkpoint["state_dict"], number),
            "optimizer_states": [
                {"state": state, "param_groups": [group | {"params": list(range(len(group["params"])))}]}
            ],
            "lr_schedulers": schedules,
            "hparams_name": None,
            "hyper_parameters": {key: own[key] for key in IDENTITY},
            "mep": own,
        }
        found.append(checkpoint | part)
    return found


def merge(checkpoints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`split` undone: subjects' own checkpoints, wherever each was trained, as one of a `SubjectBatch`.

    Raises:
        CheckpointError: they are at different steps.
    """
    steps = sorted({one["global_step"] for one in checkpoints})
    if len(steps) > 1:
        raise CheckpointError(f"subjects at steps {steps[0]} and {steps[-1]} cannot go on together: go on with each")
    trained: dict[str, Any] = {}
    states: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for number, one in enumerate(checkpoints):
        (optimizer,), first = one["optimizer_states"], sum(len(group["params"]) for group in groups)
        trained |= {f"subjects.{number}.{name}": value for name, value in one["state_dict"].items()}
        states |= {first + i: state for i, state in optimizer["state"].items()}
        groups += [group | {"params": [first + i for i in group["params"]]} for group in optimizer["param_groups"]]
    schedules = [
        {key: [one[key][0] for one in each] if key in PER_GROUP else value for key, value in each[0].items()}
        for each in zip(*(one["lr_schedulers"] for one in checkpoints), strict=True)
    ]
    shared = {key: value for key, value in checkpoints[0].items() if key not in ("hparams_name", "hyper_parameters")}
    return shared | {
        "state_dict": trained,
        "optimizer_states": [{"state": states, "param_groups": groups}],
        "lr_schedulers": schedules,
        "mep": {"subjects": [one["mep"] for one in checkpoints]},
    }


def _compare(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    for key in {**saved, **mine}:
        if key in mine and saved.get(key) != mine[key]:
            raise CheckpointError(
                f"the checkpoint was trained with {key} {saved.get(key)!r}, not {mine[key]!r}: set model.{key} to it"
            )


def _identity(module: Any) -> dict[str, Any]:
    return {
        "base": module.base_name,
        "precision": module.precision,
        "method": module.method,
        "seed": module.seed,
    }


def _settings(module: Any) -> dict[str, Any]:
    """The optimiser's settings, and the estimator's with its name."""
    own = {name: getattr(module, name) for name in SETTINGS}
    own["betas"] = list(own["betas"])
    for part in module.adapter.parts:
        own |= {f"adapter.{key}": getattr(part, key) for key in ("rank", "alpha") if hasattr(part, key)}
    own |= _plain("estimator", module.estimator)
    if module.selector is not None:
        own |= _plain("selector", module.selector) | _plain("low_estimator", module.low_estimator)
    return own


def _hollow(module: Any) -> list[Any] | None:
    """Where the hollow begins and ends, and how many draws steps go round."""
    hollow = module.hollow
    return None if hollow is None else [hollow.cut.first, hollow.cut.last, hollow.samples]


def _around(hollow: list[Any] | None) -> str:
    return "without a hollow" if hollow is None else "around {} to {} on {} samples".format(*hollow)


def _plain(name: str, part: Any) -> dict[str, Any]:
    """A part's class and its settings, as far as they are plain values."""
    settings = {key: value for key, value in vars(part).items() if not key.startswith("_")}
    plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str, type(None)))}
    return {name: type(part).__name__} | {f"{name}.{key}": value for key, value in plain.items()}
