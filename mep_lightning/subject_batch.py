"""Several subjects on one device: each trains a token of its own, and one forward pass over the frozen base serves all.

A step of S subjects is S steps of `PersonalizationModule`, whose draws, directions, subspaces and updates stay each
subject's own; their members' rows lie in one batch. What a subject learns is what it would learn alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mep_lightning import advice, objective, optimization
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base, prompt_ids
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.checkpoint import describe, part_of, refuse_another_run
from mep_lightning.data import Batches, SubjectData
from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimation import along_of, dims_of, tell
from mep_lightning.estimators import Backprop, FiniteDifferenceEstimator, FusedZOAdam, ZerothOrderEstimator
from mep_lightning.estimators.perturbation import HERE, Members
from mep_lightning.kernels.tf32 import whole_products
from mep_lightning.module import PersonalizationModule
from mep_lightning.phases import phase
from mep_lightning.preparation import acquaint, encode
from mep_lightning.skipping import Skipped
from mep_lightning.tangents import Dual
from mep_lightning.templates import fill
from mep_lightning.timesteps import TimestepSampler

ALIKE = (
    *("base_name", "precision", "activations", "offload", "method", "lr", "lr_scheduler", "betas", "eps"),
    *("weight_decay", "optimizer", "checkpointing", "compiled", "cuda_graph", "members_at_once"),
)
"""What subjects of a batch have in common, beside their estimators."""


class SubjectBatchData(LightningDataModule):
    """The photos of several subjects; a batch is a list of theirs.

    Args:
        subjects: name -> its photos; names stand for the subjects in logs and exports.
    """

    def __init__(self, subjects: Mapping[str, SubjectData]) -> None:
        super().__init__()
        if not subjects:
            raise UserError("SubjectBatchData was given no subject: give it at least one")
        if len(set(map(id, subjects.values()))) < len(subjects):
            raise UserError("SubjectBatchData was given the same SubjectData twice: make one for each subject")
        self.subjects = dict(subjects)
        self.repeats = None

    def setup(self, stage: str | None = None) -> None:
        """Find and decode every subject's photos."""
        for data in self.subjects.values():
            data.setup(stage)

    def refuse_unlike(self) -> None:
        """Raise UserError where encoded subjects' batches would not go together."""
        sizes = {(one.batch_size, max(one.latents), one.has_priors) for one in self.subjects.values()}
        if len(sizes) > 1 or any(one.has_priors for one in self.subjects.values()):
            raise UserError(
                "the subjects of a SubjectBatch need the same batch_size and resolution, and no prior preservation"
            )

    def batch(self, step: int) -> list[dict[str, Any]]:
        """Every subject's batch of a step."""
        return [dict(data.batch(step)) for data in self.subjects.values()]

    def train_dataloader(self) -> Batches:
        """Batches from the step the trainer is at, without an end.

        Raises:
            UserError: the trainer waits for an end.
        """
        if self.trainer is not None and self.trainer.max_steps == -1 and self.trainer.max_epochs not in (None, -1):
            raise UserError("An epoch of SubjectBatchData never ends: give the Trainer max_steps")
        return Batches(self)


class SubjectBatch(LightningModule):
    """Trains the tokens of several `PersonalizationModule`s together; fit it with `SubjectBatchData`.

    Args:
        subjects: one for each subject in the data, in their order, alike in base, method and settings; seeds may
            differ. Each has its token afterwards, as if it had been trained alone.

    Raises:
        UserError: they are not alike, or train something else than tokens.
    """

    def __init__(self, subjects: Sequence[PersonalizationModule]) -> None:
        super().__init__()
        if not subjects:
            raise UserError("SubjectBatch was given no subject: give it at least one PersonalizationModule")
        for one in subjects:
            _refuse_unlike(subjects[0], one)
        self.automatic_optimization = False
        self.strict_loading = False
        self.subjects = nn.ModuleList(subjects)
        self.graphed: CUDAGraphed | None = None

    @property
    def each(self) -> list[PersonalizationModule]:
        """The subjects."""
        return [one for one in self.subjects if isinstance(one, PersonalizationModule)]

    @property
    def first(self) -> PersonalizationModule:
        """That whose settings speak for all."""
        return self.each[0]

    @property
    def base(self) -> Base | None:
        """What all of them share."""
        return self.first.base

    @property
    def method(self) -> str:
        """Of all of them."""
        return self.first.method

    @property
    def timesteps(self) -> TimestepSampler:
        """What draws their timesteps, such as `PUTS` sets."""
        return self.first.timesteps

    @timesteps.setter
    def timesteps(self, sampler: TimestepSampler) -> None:
        for module in self.each:
            module.timesteps = sampler

    # -- before the first step -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Encode all photos, load the base once, and attach every token to it.

        Raises:
            UserError: a Trainer of several processes or of another precision, or data that do not fit.
        """
        advice.refuse_precision(self)
        data, device = self._data(), self.trainer.strategy.root_device
        if self.trainer.world_size > 1:
            raise UserError("SubjectBatch trains in one process: let each process train subjects of its own")
        for module, photos in zip(self.each, data.subjects.values(), strict=True):
            module.trainer = self.trainer
            acquaint(module, photos)
        if stage == "fit":
            advice.refuse_streaming_backwards(self.first, device)
            found = self.first.base or self.first.open(device)
            for module in self.each:
                module.fill_in_defaults(found.family)
            with found.borrowed_vae("encoder") as vae:
                about = {"resolution": found.resolution, "vae_factor": found.vae_factor, "family": found.family}
                lender: Any = SimpleNamespace(vae=vae, device=found.device, **about)
                for module, photos in zip(self.each, data.subjects.values(), strict=True):
                    encode(module, photos, lender)
            data.refuse_unlike()
        base = self.first.load(device)
        for module in self.each[1:]:
            module.take(base)
        stale = [self.graphed, *(module.graphed for module in self.each)]
        base.graphs = [graph for graph in base.graphs if graph not in stale]
        self.graphed = None
        for module in self.each:  # one graph serves them all
            module.graphed = None
        if self.first.takes_graph(base):
            insists = self.first.cuda_graph is True
            self.graphed = CUDAGraphed(partial(objective.of_tokens, self.first), insists)
            base.graphs.append(self.graphed)

    def _data(self) -> SubjectBatchData:
        data: Any = getattr(self.trainer, "datamodule", None)
        count = len(self.subjects)
        if not isinstance(data, SubjectBatchData) or len(data.subjects) != count:
            raise UserError(f"SubjectBatch of {count} subjects is fitted with SubjectBatchData of as many")
        return data

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One Adam over all tokens."""
        groups = [group for module in self.each for group in module.adapter.parameter_groups]
        return optimization.configure(self.first, groups)

    def on_train_start(self) -> None:
        """What hangs on the run's end."""
        optimization.refuse_odd_state(self.first)
        optimization.resume_schedule(self)

    def teardown(self, stage: str) -> None:
        """Give a graph back, as `PersonalizationModule.teardown`."""
        if stage == "fit" and self.graphed is not None and self.base is not None:
            self.graphed.clear()
            self.base.graphs = [graph for graph in self.base.graphs if graph is not self.graphed]
            self.graphed = None

    # -- the step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: list[dict[str, Any]], batch_idx: int) -> None:
        """Every subject draws; one forward pass; every subject estimates, projects and steps."""
        with phase("step"):
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.zero_grad()
            with torch.autocast(self.device.type, enabled=self.first._autocast(self.first.estimator)):
                losses, sound = self._give_gradients(batch, optimizer.optimizer)
            step = self.global_step
            optimizer.step()
            if isinstance(scheduler := self.lr_schedulers(), LambdaLR):
                scheduler.step()
            for module, is_sound in zip(self.each, sound, strict=True):
                if module.subspace and is_sound:
                    module.subspace.observe(_theta(module).detach())
                module.skipped.note(is_sound, step)
        self.log("train/loss", losses.mean(), prog_bar=True, batch_size=1)
        for name, module, loss in zip(self._data().subjects, self.each, losses.mean(0), strict=True):
            self.log(f"train/loss/{name}", loss, batch_size=1)
            if module.skipped.total:
                self.log(f"train/skipped/{name}", float(module.skipped.total), batch_size=1)

    def _give_gradients(self, batch: list[dict[str, Any]], optimizer: Any) -> tuple[Tensor, list[bool]]:
        """Give the optimizer every token's gradient that is finite; the losses [V, S], and whose are."""
        estimator = self.first.estimator
        if isinstance(estimator, ZerothOrderEstimator):
            with torch.no_grad():
                return self._tell(batch, optimizer)
        for module in self.each:
            if module.subspace:
                module.subspace.prepare(_theta(module))
        with torch.enable_grad():
            losses = self.losses([HERE] * len(self.each), batch)  # [1, S]
            assert isinstance(estimator, Backprop)
            estimator.backward(lambda _: losses.sum()[None], list(self.parameters()))
        for module in self.each:
            if module.subspace and (grad := _theta(module).grad) is not None:
                module.subspace.project_(grad)
        given = [(_theta(module).grad, loss) for module, loss in zip(self.each, losses.detach()[0], strict=True)]
        sound = _finite([[numbers for numbers in one if numbers is not None] for one in given])
        for module, is_sound in zip(self.each, sound, strict=True):
            if not is_sound:
                _theta(module).grad = None
        return losses.detach(), sound

    def _tell(self, batch: list[dict[str, Any]], optimizer: Any) -> tuple[Tensor, list[bool]]:
        assert isinstance(optimizer, FusedZOAdam)
        asked = []
        for module in self.each:
            if module.subspace:
                module.subspace.prepare(_theta(module))
            along = along_of(module, _estimator(module))
            asked.append((_estimator(module).asked(self.global_step, along), along))
        whole = whole_products() if isinstance(self.first.estimator, FiniteDifferenceEstimator) else nullcontext()
        with whole:
            told = self.losses([members for members, _ in asked], batch)  # [V, S], of tangents a Dual
        losses, weighed = [], []
        for s, (module, (members, along)) in enumerate(zip(self.each, asked, strict=True)):
            estimator = _estimator(module)
            heard = estimator.heard(told[:, s], len(members))
            weighed.append(estimator.weights(heard, dims_of(module), along is not None))
            losses.append(heard[: estimator.members])
        sound = _finite([[one, weights] for one, weights in zip(losses, weighed, strict=True)])
        for module, (_, along), weights, is_sound in zip(self.each, asked, weighed, sound, strict=True):
            if is_sound:
                tell(module, _estimator(module), optimizer, weights, along)
        return torch.stack(losses, 1), sound

    def losses(self, members: Sequence[Members], batch: list[dict[str, Any]]) -> Tensor:
        """What every subject's V members err by on its own draw, in one forward or a few; of tangents a `Dual`.

        Args:
            members: of each of S subjects, where they stand.
            batch: each subject's.

        Returns:
            fp32 [V, S].
        """
        base = self.first.loaded()
        values = [own.of(_theta(module)) for module, own in zip(self.each, members, strict=True)]
        draws = [module.draw(own) for module, own in zip(self.each, batch, strict=True)]
        prompts = [
            fill(text, _phrase(module, s), module.class_word)
            for s, (module, own) in enumerate(zip(self.each, batch, strict=True))
            for text in own["prompts"]
        ]
        stacked = torch.stack(values, 1)  # [V, S, vectors, D]
        names = {objective.subject_name(s): values[0][0] for s in range(len(values))}
        ids = prompt_ids(base, prompts, names)
        noisy, timestep, target = (
            torch.cat([getattr(draw, name) for draw in draws]) for name in ("noisy", "timestep", "target")
        )
        rest = ids, noisy, timestep, target
        replays = self.graphed is not None and not torch.is_grad_enabled()
        run: Any = self.graphed if replays else partial(objective.of_tokens, self.first)
        if isinstance(stacked, Dual):
            return Dual(run(stacked.stack, *rest))
        count = len(stacked)
        parts = objective.portions(count, self.first.members_at_once or count)
        return torch.cat([run(stacked[places], *rest) for places in parts])[:count]

    # -- after and between ---------------------------------------------------------------------------------------------

    def export(self, folder: str | Path) -> dict[str, list[Path]]:
        """Write every subject's token to a folder of its name, as `TokenEmbedding.export` does; name -> paths."""
        return {
            name: module.adapter.export(Path(folder) / name)
            for name, module in zip(self._data().subjects, self.each, strict=True)
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside tokens and optimiser: what every subject's run was."""
        checkpoint["mep"] = {"subjects": [describe(module) for module in self.each]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check by hand that the checkpoint is of these subjects and complete.

        Raises:
            CheckpointError: another number of subjects, or other settings.
        """
        saved = (checkpoint.get("mep") or {}).get("subjects")
        if not isinstance(saved, list) or len(saved) != len(self.subjects):
            raise CheckpointError(f"the checkpoint is not one of {len(self.subjects)} subjects trained together")
        for number, (module, own) in enumerate(zip(self.each, saved, strict=True)):
            refuse_another_run({"mep": own, "state_dict": part_of(checkpoint["state_dict"], number)}, module)
            module.skipped = Skipped.from_checkpoint(own.get("skipped"))
            if module.subspace:
                module.subspace.load_state_dict(own["subspace"])


def _finite(numbers: list[list[Tensor]]) -> list[bool]:
    """Of which subjects all numbers are finite."""
    each = [torch.cat([one.flatten().float() for one in own]).isfinite().all() for own in numbers]
    return [bool(flag) for flag in torch.stack(each).tolist()]  # one look at a GPU


def _phrase(module: PersonalizationModule, number: int) -> str:
    name = objective.subject_name(number)
    return f"{name} {module.class_word}" if module.class_word else name


def _theta(module: PersonalizationModule) -> nn.Parameter:
    assert isinstance(module.adapter, TokenEmbedding)
    return module.adapter.theta


def _estimator(module: PersonalizationModule) -> ZerothOrderEstimator:
    assert isinstance(module.estimator, ZerothOrderEstimator)
    return module.estimator


def why_not_batched(module: PersonalizationModule) -> str | None:
    """What keeps a module out of any batch of subjects, such as "its adapter is LoRA"; None where nothing does."""
    if not isinstance(module.adapter, TokenEmbedding):
        return f"its adapter is {type(module.adapter).__name__}"
    if not (optimization.weighs(module.estimator) or type(module.estimator).estimate is Backprop.estimate):
        return f"its estimator is {type(module.estimator).__name__}"
    if module.selector is not None or module.hollow is not None:
        return f"it has a {'selector' if module.hollow is None else 'hollow'}"
    return None


def _refuse_unlike(first: PersonalizationModule, one: PersonalizationModule) -> None:
    """Raise UserError where a subject cannot share a batch with the first."""
    if (why := why_not_batched(one)) is not None:
        raise UserError(
            f"SubjectBatch trains tokens by a gradient, and has no place for a subject where {why}: train it alone"
        )
    unlike = [name for name in ALIKE if getattr(one, name) != getattr(first, name)]
    kinds = [(type(m.estimator), getattr(m.estimator, "n", 0), type(m.subspace)) for m in (first, one)]
    if kinds[0] != kinds[1]:
        unlike.append("estimator or subspace")
    if getattr(one.adapter, "vectors", 1) != getattr(first.adapter, "vectors", 1):
        unlike.append("adapter.vectors")
    if unlike:
        raise UserError(f"the subjects of a SubjectBatch differ in {', '.join(unlike)}: give all of them the same")
