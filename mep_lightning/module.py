"""The training step: one module for every method, its parts swapped.

Per batch: timesteps, noise and prompts from (seed, step) -> the selector takes a branch -> its estimator asks for
losses and answers with a gradient of the adapter -> the subspace projects it -> one wrapped `optimizer.step()`, so that
Lightning counts it.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor
from torch.optim.lr_scheduler import LambdaLR

from mep_lightning import advice, defaults, objective, optimization
from mep_lightning.adapters import Adapter, TokenEmbedding
from mep_lightning.bases import (
    Base,
    BaseFolder,
    Conditioning,
    condition_on,
    exact_device,
    identify,
    load_base,
    open_base,
    predict_noise,
    remember,
)
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.bases.load import PRECISIONS, activation_dtype
from mep_lightning.checkpoint import describe, refuse_another_run
from mep_lightning.data import SubjectData
from mep_lightning.distributed import ALONE, COMPARED_EVERY, Ranks
from mep_lightning.draws import Draw, Moments, noised, step_generator
from mep_lightning.errors import SEEDS, UserError, refuse_unless
from mep_lightning.estimation import agreed, give_gradient, hold_alike
from mep_lightning.estimators import Backprop, Estimator, Subspace
from mep_lightning.estimators.perturbation import Members
from mep_lightning.hollow import Hollow
from mep_lightning.optimization import OPTIMIZERS, SCHEDULES
from mep_lightning.phases import phase
from mep_lightning.preparation import acquaint, encode, encodes
from mep_lightning.selection import Selector
from mep_lightning.skipping import Skipped, gradients, is_sound, norm_of, skip
from mep_lightning.templates import fill
from mep_lightning.timesteps import TimestepSampler, UniformTimesteps


class PersonalizationModule(LightningModule):
    """Personalises a frozen base: photos in, an adapter out.

    Args:
        base: `tiny`, a folder in diffusers' layout, a single .safetensors file, or a hub id.
        precision: what the base's weights are kept in: "fp32", "bf16", "fp16", "int8" or "int4".
        adapter: what is trained; a `TokenEmbedding` by default.
        estimator: where the gradient comes from; `Backprop` by default.
        subspace: a `SubspaceGradient` or `ConditioningSubspace` that denoises it, or None.
        timesteps: which timesteps are drawn; all by default (the `PUTS` callback narrows them).
        selector: takes a branch in every step, `estimator` at the data's resolution or `low_estimator` at
            `low_resolution`; None always takes the first.
        low_estimator: where the gradient of the branch of low resolution comes from; `Backprop` by default.
        low_resolution: of that branch, px; "auto" is the method's own for this base.
        lr: Adam's learning rate; "auto" is the method's own for this base.
        lr_scheduler: how lr goes on: "constant", or down to 0 after the last step, "linear" or as a "cosine"; "auto" as
            for lr. A resumed run goes on along the schedule to its own last step.
        betas: Adam's.
        eps: Adam's; "auto" as for lr.
        weight_decay: Adam's.
        optimizer: "adam", or "adam8bit", whose moments take a quarter (bitsandbytes, on a GPU).
        checkpointing: recompute the U-Net's activations in a backward pass instead of keeping them: less memory for a
            forward pass more. Methods without a backward pass have nothing to keep.
        members_at_once: how many members of a zeroth-order step, or of a search's population, go through the U-Net in
            one batch; None takes all. Fewer take less memory and more time, and round otherwise in the last bits;
            streamed weights visit once for each batch.
        cuda_graph: on a GPU, replay a token's forward-only step as one CUDA graph instead of launching its kernels one
            by one; it keeps the step's activations, and is captured anew after pictures were drawn. "auto" does so
            where it can be captured and nothing is compiled.
        compile: let `torch.compile` fuse the U-Net's operations; it compiles at the first step, and rounds otherwise in
            the last bits.
        activations: what int8 and int4 weights compute in: "fp32", "bf16" or "fp16"; "auto" is fp32 on a CPU and fp16
            on a GPU. "int8" is for `ForwardGradientEstimator` and int8 weights: while training, linear layers of the
            U-Net multiply integers, all else is in half precision.
        offload: "none" keeps the base's weights on the device. "stream" leaves them in host memory, from where they
            visit a GPU layer by layer, once a step; on a CPU in a file mapped into memory. On a GPU a backward pass
            needs quantised weights and `checkpointing`.
        seed: of noise, timesteps, prompts and perturbations; the same seed gives the same adapter, on a CPU bit
            by bit.
        method: the name under which `auto` values are looked up; told from the parts when None.
    """

    AUTO: ClassVar[dict[str, str]] = {"lr": "lr", "lr_scheduler": "lr_scheduler", "eps": "eps"}
    AUTO |= {"low_resolution": "low_resolution"}

    def __init__(
        self,
        base: str = "tiny",
        precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32",
        adapter: Adapter | None = None,
        estimator: Estimator | None = None,
        subspace: Subspace | None = None,
        timesteps: TimestepSampler | None = None,
        selector: Selector | None = None,
        low_estimator: Estimator | None = None,
        low_resolution: int | Literal["auto"] | None = None,
        lr: float | Literal["auto"] = "auto",
        lr_scheduler: Literal["auto", "constant", "linear", "cosine"] = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        optimizer: Literal["adam", "adam8bit"] = "adam",
        checkpointing: bool = False,
        members_at_once: int | None = None,
        cuda_graph: bool | Literal["auto"] = "auto",
        compile: bool = False,
        activations: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto",
        offload: Literal["none", "stream"] = "none",
        seed: int = 0,
        method: str | None = None,
    ):
        super().__init__()
        for name, value in (("lr", lr), ("eps", eps)):
            fine = value == "auto" if isinstance(value, str) else 0 < value < math.inf
            refuse_unless(fine, f"model.{name}", value, "a number above 0, or auto")
        if precision in PRECISIONS:  # an unknown one is told when it is loaded
            activation_dtype(precision, torch.device("cpu"), "", activations)
        refuse_unless(lr_scheduler in SCHEDULES, "model.lr_scheduler", lr_scheduler, f"one of {', '.join(SCHEDULES)}")
        refuse_unless(optimizer in OPTIMIZERS, "model.optimizer", optimizer, f"one of {', '.join(OPTIMIZERS)}")
        refuse_unless(all(0 <= beta < 1 for beta in betas), "model.betas", betas, "two numbers from 0 to below 1")
        refuse_unless(0 <= weight_decay < math.inf, "model.weight_decay", weight_decay, "0 or more")
        fine = members_at_once is None or (type(members_at_once) is int and members_at_once >= 1)
        refuse_unless(fine, "model.members_at_once", members_at_once, "1, 2, ... or null for all")
        refuse_unless(0 <= seed < SEEDS, "model.seed", seed, f"0 to {SEEDS - 1}")
        self.automatic_optimization = False
        self.strict_loading = False
        self.base_name, self.precision, self.activations, self.seed = str(base), precision, activations, seed
        self.adapter = adapter if adapter is not None else TokenEmbedding()
        self.selector = selector
        self.low_resolution: Any = None if selector is None else low_resolution or "auto"
        # Copies: what `auto` becomes, the seed and the path are this module's, and a part may be given to several.
        self.estimator = copy.copy(estimator) if estimator is not None else Backprop()
        self.low_estimator = copy.copy(low_estimator) if low_estimator is not None else Backprop()
        self.subspace = copy.deepcopy(subspace)
        self.hollow: Hollow | None = None
        self.timesteps: TimestepSampler = UniformTimesteps() if timesteps is None else copy.copy(timesteps)
        self.lr, self.lr_scheduler = lr, lr_scheduler
        self.betas, self.eps, self.weight_decay, self.optimizer = betas, eps, weight_decay, optimizer
        self.checkpointing, self.offload, self.members_at_once = checkpointing, offload, members_at_once
        self.cuda_graph: bool | str = cuda_graph
        self.predict_noise = predict_noise
        self.compiled = compile
        self.graphed: CUDAGraphed | None = None
        self.ranks = ALONE
        """The processes that train together, once a fit has begun."""
        self.method = method or defaults.method_of(self.adapter, self.estimator, selector, subspace)
        self.class_word: str | None = None
        self.photos: SubjectData | None = None
        """Of the subject, where the data are such."""
        self.base: Base | None = None
        self.horizon: int | None = None
        """How many steps the selector reckons with; a resumed run keeps its first."""
        self.prior_weight = 1.0
        """Of the loss of what the class looks like (`PriorPreservation`)."""
        self.example: str | None = None
        """A prompt that will be trained on, with "{}" where the subject goes; None where none is known."""
        self.skipped = Skipped()
        """Steps whose loss or gradient was not finite."""
        self._texts: list[str] = []
        for one in self.estimators:
            if one.seed is None:
                one.seed = seed
        if self.subspace is not None and not isinstance(self.adapter, TokenEmbedding):
            raise UserError(
                f"model.subspace is for a TokenEmbedding, not for a {type(self.adapter).__name__}: leave it out"
            )
        advice.refuse_integers(self)
        advice.refuse_search(self)
        advice.refuse_compiled_tangents(self)
        if not self.adapter.is_perturbed and any(one.forward_only for one in self.estimators):
            raise UserError(f"{type(self.adapter).__name__} is trained by backpropagation alone: set Backprop")
        self.save_hyperparameters({"base": self.base_name, "precision": precision, "method": self.method, "seed": seed})

    # -- before the first step -----------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """Of the base, loaded or not."""
        return self.base.family if self.base is not None else identify(self.base_name).family

    @property
    def estimators(self) -> list[Estimator]:
        """Of every branch that a step can take."""
        return [self.estimator] if self.selector is None else [self.estimator, self.low_estimator]

    @property
    def forward_only(self) -> bool:
        """Whether no step has a backward pass."""
        return all(one.forward_only for one in self.estimators)

    def setup(self, stage: str) -> None:
        """Encode the photos, load the base, attach the adapter: the autoencoder is gone before the U-Net comes."""
        advice.refuse_precision(self)
        attached = self._trainer is not None
        data = getattr(self.trainer, "datamodule", None) if attached else None
        device = self.trainer.strategy.root_device if attached else torch.device("cpu")
        if attached:
            acquaint(self, data)
        if stage == "fit":
            self.ranks = Ranks.of(self._trainer)
            advice.refuse_one_resolution(self)
            advice.refuse_left_hollow(self)
            advice.refuse_streaming_backwards(self, device)
        if data is not None and stage == "fit" and encodes(data):
            found = self.base or self.open(device)
            self.fill_in_defaults(found.family)
            encode(self, data, found)
            self._texts += [self.named(text) for text in getattr(data, "texts", ())]
        base = self.load(device)
        texts, self._texts = self._texts, []
        if stage == "fit":
            self.remember(texts)  # new to a base that was there before
            advice.refuse_ranks(self, self.ranks)
            advice.warn_of_idle_switches(self, base)

    def hollow_out(self, asked: Any) -> None:
        """Cut the middle out of the U-Net, as far as `HollowedActivations` asks for, once its base is there."""
        values = defaults.lookup(self.method, self.family, self.precision, self.activations)
        defaults.fill_in(asked, values, self.method)
        self.hollow = Hollow(asked.fraction, asked.samples)

    def will_draw(self, prompts: Sequence[str]) -> None:
        """Prompts that pictures will be drawn of: methods that train no text embed them before the U-Net comes."""
        self._texts += prompts

    def load(self, device: str | torch.device = "cpu") -> Base:
        """Load the base (once) and attach the adapter; also all that generating pictures needs."""
        if self.base is None or self.base.device != exact_device(device):
            family = identify(self.base_name).family
            self.fill_in_defaults(family)
            dtype = activation_dtype(self.precision, torch.device(device), family, self.activations)
            advice.warn_of_rounding(self, dtype)
            if self.base is not None:
                self.base.close()
                self.adapter.detach()
            self.base = None  # the old one goes before the new one comes
            gc.collect()  # with the cycles in it
            self.base = load_base(
                self.base_name,
                self.precision,
                device,
                self.offload,
                activations=self.activations,
                vae=False,
                prompts=None if self.adapter.trains_text else ["", *self._texts],
            )
        return self.take(self.base)

    def open(self, device: str | torch.device, *, weights: bool = True) -> BaseFolder:
        """The base as this module will load it, known and not loaded; `weights` as for `open_base`."""
        return open_base(
            self.base_name, self.precision, device, self.offload, activations=self.activations, weights=weights
        )

    def take(self, base: Base) -> Base:
        """Train on a base that is there: what is `auto` becomes its values, and the adapter is attached to it."""
        self.fill_in_defaults(base.family)
        self.base = base
        if self.graphed in base.graphs:
            base.graphs.remove(self.graphed)
        insists = self.cuda_graph is True
        self.graphed = CUDAGraphed(partial(objective.of_token, self), insists) if self.takes_graph(base) else None
        base.graphs += [self.graphed] if self.graphed else []
        compiles = self.compiled and base.offload == "none"
        self.predict_noise = torch.compile(predict_noise, dynamic=False) if compiles else predict_noise
        self.timesteps.follow(base.scheduler.alphas_cumprod, base.info.prediction)
        if base.guest is not None and not any(part is base.guest for part in self.adapter.parts):
            base.guest.detach()  # what another module has learned is no part of this base
            base.guest = None
        self.adapter.attach(base, self.class_word, without=self.hollow.inside(base) if self.hollow else ())
        for one in self.estimators:
            one.begin(self.adapter, base)
        if self.subspace is not None:
            self.subspace.begin(self.adapter, base, None if self.example is None else self.named(self.example))
        if self.hollow is not None:
            self.adapter.origin["hollowed"] = str(self.hollow.fraction)
        return base

    def takes_graph(self, base: Base) -> bool:
        """Whether a step is replayed as a CUDA graph, which holds a token's members alone."""
        on_gpu = base.device.type == "cuda" and base.offload == "none"  # streamed weights come when they are called for
        wanted = self.cuda_graph is True or (self.cuda_graph == "auto" and not self.compiled)
        return wanted and on_gpu and self.forward_only and isinstance(self.adapter, TokenEmbedding)

    def fill_in_defaults(self, family: str) -> None:
        """Give what is "auto" its values for a base of a family."""
        values = defaults.lookup(self.method, family, self.precision, self.activations)
        for part in (self, *self.estimators, self.subspace, *self.adapter.parts):
            defaults.fill_in(part, values, self.method)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over the adapter (`optimization.configure`)."""
        return optimization.configure(self)

    def on_train_start(self) -> None:
        """What hangs on the run's end."""
        optimization.refuse_odd_state(self)
        optimization.resume_schedule(self)
        hold_alike(self)
        if self.selector is not None and self.horizon is None:
            self.horizon = advice.horizon(self.trainer.estimated_stepping_batches)

    def teardown(self, stage: str) -> None:
        """Give back what only steps need: a base that others share would keep a graph, and with it a step's memory."""
        if stage == "fit" and self.graphed is not None:
            self.graphed.clear()
            if self.base is not None:
                self.base.graphs = [graph for graph in self.base.graphs if graph is not self.graphed]
            self.graphed = None

    # -- the step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Draw, estimate, project, step."""
        with phase("step"):
            self._log_step(*self._step(batch))

    def _step(self, batch: dict[str, Any]) -> tuple[Draw, Tensor, Tensor | None]:
        step, draw, optimizer = self.global_step, self.draw(batch), self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one optimizer: its wrapped step is what Lightning counts
        estimator = self.estimator if draw.high else self.low_estimator
        optimizer.zero_grad()
        with torch.autocast(self.device.type, enabled=self._autocast(estimator)):
            losses = give_gradient(self, estimator, draw, optimizer.optimizer)
        grads = gradients(self)
        norm = norm_of(grads)
        sound = is_sound(estimator, losses, optimizer.optimizer, grads, norm)
        if not sound:
            skip(optimizer.optimizer)
        optimizer.step()  # a skipped step is counted too: the next one draws anew
        if isinstance(scheduler := self.lr_schedulers(), LambdaLR):  # manual optimisation steps it by hand
            scheduler.step()
        if self.ranks.world > 1 and self.global_step % COMPARED_EVERY == 0:
            hold_alike(self)
        if self.subspace and sound:
            agreed(self, self.subspace.observe, self.adapter.numbered()[0].detach())
        self.skipped.note(sound, step)
        if not grads and (made := gradients(self)):  # from what the losses said of directions
            grads, norm = made, norm_of(made)
        return draw, losses, norm if grads else None

    def draw(self, batch: dict[str, Any]) -> Draw:
        """Noise, timesteps, texts and branch of this step, a pure function of (seed, step, batch) and of the rank.

        Ranks that share members have the same draw. Others have their own, but take the same branch.
        """
        step, ranks = self.global_step, self.ranks
        if self.hollow is None or not self.hollow.is_ready:
            timestep, high, generator = self._branch(batch, step)
            estimator = self.estimator if high else self.low_estimator
            own = ranks.index(step, ranks.shares_members and estimator.forward_only)
            if own != step:
                batch, generator = self._batch_at(batch, own), step_generator(self.seed, own)
            return self.draw_for(batch, high, generator, timestep)
        own = ranks.index(step, ranks.shares_members and self.estimator.forward_only)
        index = self.hollow.index(self.seed, own)  # steps go round the draws that were made ready
        draw = self.draw_at(self.trainer.datamodule.batch(index), index)  # type: ignore[attr-defined]
        return replace(draw, activation=self.hollow.activation(index).to(draw.noisy))

    def draw_at(self, batch: dict[str, Any], step: int) -> Draw:
        """The draw of any step."""
        timestep, high, generator = self._branch(batch, step)
        return self.draw_for(batch, high, generator, timestep)

    def _branch(self, batch: dict[str, Any], step: int) -> tuple[Tensor | None, bool, Generator]:
        """The timesteps that a step's branch hangs on, whether it is the high one, and what draws the rest."""
        generator = step_generator(self.seed, step)
        if self.selector is None:
            return None, True, generator
        timestep = self.timesteps.sample(len(batch["prompts"]), generator)
        return timestep, self.selector.takes_high(timestep, self.seed, step, self.horizon or step + 1), generator

    def _batch_at(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        """Another draw's photos, where the data know of draws; data of the user's own give each rank its batches."""
        return batch if self.photos is None else dict(self.photos.batch(index))

    def draw_for(self, batch: dict[str, Any], high: bool, generator: Generator, timestep: Tensor | None = None) -> Draw:
        """The draw of a branch; timesteps int64 [B], drawn after the noise where there are none."""
        moments = self._moments(batch, None if high else self.low_resolution)
        noisy, timestep, target = noised(self.loaded(), moments, generator, timestep, self.timesteps)
        texts = [self.named(text) for text in batch["prompts"]]
        return Draw(noisy, timestep, target, texts, high, batch.get("priors", 0))

    def named(self, text: str) -> str:
        """A template with the subject in its place."""
        return fill(text, self.adapter.phrase(self.class_word), self.class_word)

    def _moments(self, batch: dict[str, Any], resolution: int | None) -> Moments:
        """The batch's latents in fp32: afresh from the data, as a bf16-true Trainer has rounded the batch's own."""
        if self.photos is not None and "rows" in batch:
            mean, std = self.photos.at(resolution or max(self.photos.latents), batch["rows"])
        else:
            mean, std = batch["mean"].float(), batch["std"].float()
        device = self.loaded().device
        return mean.to(device), std.to(device)

    def losses(self, members: Members | Tensor, draw: Draw) -> Tensor:
        """Squared error of what each member predicts, in one forward or, with `members_at_once`, a few.

        Args:
            members: where they stand, or values of a token, [V, vectors, D].
            draw: what to predict from; the same for all members (common random numbers).

        Returns:
            fp32 [V].
        """
        return objective.losses(self, members, draw)

    def _log_step(self, draw: Draw, losses: Tensor, norm: Tensor | None) -> None:
        count = len(draw.prompts)
        self.log("train/loss", losses.mean(), prog_bar=True, batch_size=count)
        # What a step has not is told as such: a logger would repeat the last that it heard.
        if norm is not None or self.selector is not None:
            self.log("train/grad_norm", math.nan if norm is None else norm, batch_size=count)
        if self.skipped.total:
            self.log("train/skipped", float(self.skipped.total), batch_size=count)
        if self.ranks.world > 1:
            self.log("train/bytes_sent", float(self.ranks.sent), batch_size=count)  # by this process so far
        if self.selector is not None:
            self.log("train/high", float(draw.high), batch_size=count)
            self.log("train/timestep", draw.timestep.float().mean(), batch_size=count)
            self.log("train/loss_high", losses.mean() if draw.high else math.nan, batch_size=count)
            self.log("train/loss_low", math.nan if draw.high else losses.mean(), batch_size=count)

    def _autocast(self, estimator: Estimator) -> bool:
        """Autocast to bf16 where the Trainer asks for it, but never for finite differences: it would drown mu."""
        return self.trainer.precision == "bf16-mixed" and not estimator.forward_only

    def loaded(self) -> Base:
        """The base.

        Raises:
            UserError: it is not there yet.
        """
        if self.base is None:
            raise UserError("the base is not loaded: call module.load() or let a Trainer set the module up")
        return self.base

    # -- after and between ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition_on(self, prompts: Sequence[str]) -> Conditioning:
        """What the U-Net is told of N prompts that may hold the trained token."""
        return condition_on(self.loaded(), prompts, self.adapter.tokens())

    def remember(self, prompts: Sequence[str]) -> None:
        """Embed prompts that `condition_on` will be asked for, where no text is trained: encoders come but once."""
        advice.refuse_cut_subjects(self, prompts)
        if not self.adapter.trains_text:
            remember(self.loaded(), prompts)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The U-Net as pictures are drawn with it, for the length of a `with`: whole, along a hollow's two paths.

        Raises:
            UserError: another module's adapter has taken this one's place in the base.
        """
        advice.refuse_displaced(self)
        here = self.loaded().device
        if next(self.adapter.parameters()).device.type != here.type:  # a Trainer leaves a module on the CPU at its end
            self.adapter.to(here)
        self.zero_grad()  # a step's gradients are of no more use, and pictures want the memory
        if self.hollow is None:
            yield
            return
        with self.hollow.two_paths(self.loaded(), self.adapter):
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside trainables and optimiser: what the run was, and the subspace's history."""
        checkpoint["mep"] = describe(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check by hand (loading is not strict) that the checkpoint is of this run and complete.

        Raises:
            CheckpointError: another base, precision or setting, or something that is missing.
        """
        refuse_another_run(checkpoint, self)
        self.horizon = checkpoint["mep"].get("horizon")
        self.skipped = Skipped.from_checkpoint(checkpoint["mep"].get("skipped"))
        if self.subspace and checkpoint["mep"]["subspace"] is not None:
            self.subspace.load_state_dict(checkpoint["mep"]["subspace"])
        for one, state in zip(self.estimators, checkpoint["mep"].get("estimators", []), strict=False):
            one.load_state_dict(state)
