"""The training step: one module for every method, its parts swapped.

Per batch: timesteps, noise and prompts from (seed, step) -> the estimator asks for losses and answers with a gradient
of the adapter -> the subspace projects it -> one wrapped `optimizer.step()`, so that Lightning counts it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.optimization import get_scheduler
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mep_lightning import defaults
from mep_lightning.adapters import Adapter, TokenEmbedding
from mep_lightning.bases import (
    Base,
    BaseFolder,
    Conditioning,
    condition_on,
    condition_on_ids,
    exact_device,
    identify,
    load_base,
    open_base,
    predict_noise,
    prompt_ids,
)
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.bases.load import PRECISIONS, QUANTIZED, activation_dtype
from mep_lightning.checkpoint import describe, refuse_another_run
from mep_lightning.data import SubjectData, sample_latents
from mep_lightning.errors import SEEDS, UserError, refuse_unless
from mep_lightning.estimators import Backprop, Estimator, FusedZOAdam, LossFn, SubspaceGradient, ZerothOrderEstimator
from mep_lightning.phases import phase
from mep_lightning.templates import fill
from mep_lightning.timesteps import TimestepSampler, UniformTimesteps

ALLOWED_TRAINER_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
SCHEDULES = ("auto", "constant", "linear", "cosine")
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The mu at which a finite difference is truest where activations are in half precision (docs/performance.md)."""


@dataclass(frozen=True)
class Draw:
    """What one step trains on.

    Attributes:
        noisy: noised latents, [B, C, H, W].
        timestep: int64 [B].
        target: what the U-Net should predict, the noise or v, fp32 [B, C, H, W].
        prompts: B texts that hold the adapter's token.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    prompts: list[str]


class PersonalizationModule(LightningModule):
    """Personalises a frozen base: photos in, an adapter out.

    Args:
        base: `tiny`, a folder in diffusers' layout, or a hub id.
        precision: what the base's weights are kept in: "fp32", "bf16", "fp16", "int8" or "int4".
        adapter: what is trained; a `TokenEmbedding` by default.
        estimator: where the gradient comes from; `Backprop` by default.
        subspace: a `SubspaceGradient` that denoises it, or None.
        timesteps: which timesteps are drawn; all by default (the `PUTS` callback narrows them).
        lr: Adam's learning rate; "auto" is the method's own for this base.
        lr_scheduler: how lr goes on: "constant", or down to 0 after the last step, "linear" or as a "cosine"; "auto" as
            for lr. A resumed run goes on along the schedule to its own last step.
        betas: Adam's.
        eps: Adam's; "auto" as for lr.
        weight_decay: Adam's.
        checkpointing: recompute the U-Net's activations in a backward pass instead of keeping them: less memory for a
            forward pass more. Methods without a backward pass have nothing to keep.
        cuda_graph: on a GPU, replay a forward-only step as one CUDA graph instead of launching its kernels one by one;
            it keeps the step's activations, and is captured anew after pictures were drawn.
        compile: let `torch.compile` fuse the U-Net's operations; it compiles at the first step, and rounds otherwise in
            the last bits.
        activations: what int8 and int4 weights compute in: "fp32", "bf16" or "fp16"; "auto" is fp32 on a CPU and fp16
            on a GPU.
        offload: "none" keeps the base's weights on the device. "stream" leaves them in host memory, from where they
            visit a GPU layer by layer, once a step; on a CPU in a file mapped into memory. On a GPU it is for methods
            without a backward pass.
        seed: of noise, timesteps, prompts and perturbations; the same seed gives bitwise the same adapter.
        method: the name under which `auto` values are looked up; told from the parts when None.
    """

    AUTO: ClassVar[dict[str, str]] = {"lr": "lr", "lr_scheduler": "lr_scheduler", "eps": "eps"}

    def __init__(
        self,
        base: str = "tiny",
        precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32",
        adapter: Adapter | None = None,
        estimator: Estimator | None = None,
        subspace: SubspaceGradient | None = None,
        timesteps: TimestepSampler | None = None,
        lr: float | Literal["auto"] = "auto",
        lr_scheduler: Literal["auto", "constant", "linear", "cosine"] = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        checkpointing: bool = False,
        cuda_graph: bool = False,
        compile: bool = False,
        activations: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
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
        refuse_unless(all(0 <= beta < 1 for beta in betas), "model.betas", betas, "two numbers from 0 to below 1")
        refuse_unless(0 <= weight_decay < math.inf, "model.weight_decay", weight_decay, "0 or more")
        refuse_unless(0 <= seed < SEEDS, "model.seed", seed, f"0 to {SEEDS - 1}")
        self.automatic_optimization = False
        self.strict_loading = False
        self.base_name, self.precision, self.activations, self.seed = str(base), precision, activations, seed
        self.adapter = adapter if adapter is not None else TokenEmbedding()
        # Copies: what `auto` becomes, the seed and the path are this module's, and a part may be given to several.
        self.estimator = copy.copy(estimator) if estimator is not None else Backprop()
        self.subspace = copy.deepcopy(subspace)
        self.timesteps: TimestepSampler = timesteps if timesteps is not None else UniformTimesteps()
        self.lr, self.lr_scheduler = lr, lr_scheduler
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.checkpointing, self.offload = checkpointing, offload
        self.cuda_graph = cuda_graph
        self.predict_noise = predict_noise
        self.compiled = compile
        self._graphed: CUDAGraphed | None = None
        self.method = method or ("zoodip" if self.estimator.forward_only else "textual_inversion")
        self.class_word: str | None = None
        self.base: Base | None = None
        if self.estimator.seed is None:
            self.estimator.seed = seed
        self.save_hyperparameters({"base": self.base_name, "precision": precision, "method": self.method, "seed": seed})

    # -- before the first step -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Encode the photos, load the base, attach the adapter: the autoencoder is gone before the U-Net comes."""
        if self._trainer is not None and self.trainer.precision not in ALLOWED_TRAINER_PRECISIONS:
            raise UserError(
                f"trainer.precision {self.trainer.precision} cannot train hand-made gradients in fp32: choose "
                f"one of {', '.join(ALLOWED_TRAINER_PRECISIONS)}"
            )
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if data is not None:
            self.class_word = getattr(data, "class_word", None)
            data.token = getattr(self.adapter, "token", None)  # captions may name it
            data.default_seed = self.seed
        device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
        if stage == "fit":
            self._refuse_streaming_backwards(device)
        if data is not None and stage == "fit":
            with phase("encode"):
                data.encode(self.base or self.open(device))
        base = self.load(device)
        if stage == "fit":
            self._warn_of_idle_switches(base)

    def load(self, device: str | torch.device = "cpu") -> Base:
        """Load the base (once) and attach the adapter; also all that generating pictures needs."""
        if self.base is None or self.base.device != exact_device(device):
            family = identify(self.base_name).family
            self._fill_in_defaults(family)
            self._warn_of_rounding(activation_dtype(self.precision, torch.device(device), family, self.activations))
            if self.base is not None:
                self.base.close()
            self.base = None  # the old one goes before the new one comes
            self.base = load_base(
                self.base_name, self.precision, device, self.offload, activations=self.activations, vae=False
            )
        return self.take(self.base)

    def open(self, device: str | torch.device, *, weights: bool = True) -> BaseFolder:
        """The base as this module will load it, known and not loaded; `weights` as for `open_base`."""
        return open_base(
            self.base_name, self.precision, device, self.offload, activations=self.activations, weights=weights
        )

    def take(self, base: Base) -> Base:
        """Train on a base that is there: what is `auto` becomes its values, and the adapter is attached to it."""
        self._fill_in_defaults(base.family)
        self.base = base
        if self._graphed in base.graphs:
            base.graphs.remove(self._graphed)
        self._graphed = CUDAGraphed(self._denoise) if self._takes_graph(base) else None
        base.graphs += [self._graphed] if self._graphed else []
        compiles = self.compiled and base.offload == "none"
        self.predict_noise = torch.compile(predict_noise, dynamic=False) if compiles else predict_noise
        (base.unet.enable_gradient_checkpointing if self.checkpointing else base.unet.disable_gradient_checkpointing)()
        self.timesteps.follow(base.scheduler.alphas_cumprod)
        self.adapter.attach(base, self.class_word)
        return base

    def _takes_graph(self, base: Base) -> bool:
        on_gpu = base.device.type == "cuda" and base.offload == "none"  # streamed weights come when they are called for
        return self.cuda_graph and on_gpu and self.estimator.forward_only

    def _fill_in_defaults(self, family: str) -> None:
        values = defaults.lookup(self.method, family, self.precision, self.activations)
        for part in (self, self.estimator, self.subspace):
            defaults.fill_in(part, values, self.method)

    def _warn_of_rounding(self, dtype: torch.dtype) -> None:
        least = ROUNDING.get(dtype, 0.0)
        exact = "activations" if self.precision in QUANTIZED else "precision"
        if isinstance(self.estimator, ZerothOrderEstimator) and self.estimator.step_size < least:
            rank_zero_warn(
                f"mu {self.estimator.step_size:g} drowns in the rounding of {str(dtype).split('.')[1]} activations, as "
                f"measured on tiny: training may be slow or diverge; take mu {least:g}, or {exact} fp32"
            )

    def _warn_of_idle_switches(self, base: Base) -> None:
        streams = base.offload == "stream"
        if self.cuda_graph and not self._takes_graph(base):
            why = "model.offload is stream" if streams else "it is for a GPU and methods without a backward pass"
            rank_zero_warn(f"model.cuda_graph does nothing here: {why}")
        if self.compiled and streams:
            rank_zero_warn("model.compile does nothing here: model.offload is stream")

    def _refuse_streaming_backwards(self, device: torch.device) -> None:
        if self.offload == "stream" and device.type == "cuda" and not self.estimator.forward_only:
            raise UserError(
                "model.offload stream is for methods without a backward pass, which would need the weights again: use "
                "zoodip, or model.checkpointing true and model.precision int8"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over the adapter, in fp32, and its learning rate's schedule (without a Trainer it stays constant)."""
        assert not isinstance(self.lr, str) and not isinstance(self.eps, str)  # filled in by `load`
        # An estimator of the user's own may make its gradient in another way than from directions' weights.
        is_ours = getattr(type(self.estimator), "estimate", None) is ZerothOrderEstimator.estimate
        kind = FusedZOAdam if is_ours else torch.optim.Adam
        optimizer = kind(
            self.adapter.parameters(), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        if self.lr_scheduler == "constant" or self._trainer is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise UserError(
                f"model.lr_scheduler {self.lr_scheduler} needs an end to run to: set trainer.max_steps, or "
                "model.lr_scheduler constant"
            )
        schedule = get_scheduler(self.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed schedule runs to this run's end, which may be another than when its checkpoint was written."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        if isinstance(schedule, LambdaLR) and isinstance(optimizer, LightningOptimizer):
            for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = lr * factor(schedule.last_epoch)

    # -- the step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Draw, estimate, project, step."""
        draw, theta, optimizer = self.draw(batch), self.adapter.theta, self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one optimizer: its wrapped step is what Lightning counts
        with torch.autocast(self.device.type, enabled=self._autocast()):
            losses = self._estimate(lambda members: self.losses(members, draw), theta, optimizer.optimizer)
        optimizer.step()
        if isinstance(scheduler := self.lr_schedulers(), LambdaLR):  # manual optimisation steps it by hand
            scheduler.step()
        if self.subspace:
            self.subspace.observe(theta.detach())
        self.log("train/loss", losses.mean(), prog_bar=True, batch_size=len(draw.prompts))
        assert theta.grad is not None
        self.log("train/grad_norm", theta.grad.norm(), batch_size=len(draw.prompts))

    def _estimate(self, loss_fn: LossFn, theta: Tensor, optimizer: Optimizer) -> Tensor:
        """Give the optimizer a projected gradient, or what it makes one from; the losses [V]."""
        estimator, subspace, step = self.estimator, self.subspace, self.global_step
        dims = subspace.dims_left if subspace else None
        if isinstance(optimizer, FusedZOAdam):
            assert isinstance(estimator, ZerothOrderEstimator)
            weights, losses = estimator.weigh(loss_fn, theta, step=step, dims=dims)
            basis = subspace.basis_on(theta.device) if subspace else None
            optimizer.receive(theta, weights, estimator.seed or 0, step, param_id=0, basis=basis)
            return losses
        grad, losses = estimator.estimate(loss_fn, theta, step=step, dims=dims)
        theta.grad = (subspace.project_(grad) if subspace else grad).to(theta.dtype)
        return losses

    def draw(self, batch: dict[str, Any]) -> Draw:
        """Noise, timesteps and texts of this step, a pure function of (seed, step, batch)."""
        base, generator = self._loaded(), step_generator(self.seed, self.global_step)
        mean, std = self._moments(batch)  # [B, C, H, W]
        latents = sample_latents(mean, std, _normal(mean, generator), base.scaling_factor)
        noise = _normal(mean, generator)
        timestep = self.timesteps.sample(len(mean), generator).to(mean.device)
        noisy = base.scheduler.add_noise(latents, noise, timestep)
        v_prediction = base.info.prediction == "v_prediction"
        target = base.scheduler.get_velocity(latents, noise, timestep) if v_prediction else noise
        phrase = self.adapter.phrase(self.class_word)
        prompts = [fill(prompt, phrase, self.class_word) for prompt in batch["prompts"]]
        return Draw(noisy.to(base.dtype), timestep, target.float(), prompts)

    def _moments(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The batch's latents in fp32: afresh from the data, as a bf16-true Trainer has rounded the batch's own."""
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, SubjectData) and "rows" in batch:
            mean, std = data.at(max(data.latents), batch["rows"])
        else:
            mean, std = batch["mean"].float(), batch["std"].float()
        device = self._loaded().device
        return mean.to(device), std.to(device)

    def losses(self, members: Tensor, draw: Draw) -> Tensor:
        """Squared error of what each member predicts, in one forward.

        Args:
            members: values of the adapter's `theta`, [V, *theta.shape].
            draw: what to predict from; the same for all members (common random numbers).

        Returns:
            fp32 [V].
        """
        base = self._loaded()
        ids = prompt_ids(base, draw.prompts, self.adapter.tokens(members))
        denoise = self._denoise if self._graphed is None or torch.is_grad_enabled() else self._graphed
        return denoise(members, ids, draw.noisy, draw.timestep, draw.target)

    def _denoise(self, members: Tensor, ids: Tensor, noisy: Tensor, timestep: Tensor, target: Tensor) -> Tensor:
        """`losses` as a function of tensors; ids [encoders, B, T]."""
        base = self._loaded()
        conditioning = condition_on_ids(base, ids, self.adapter.tokens(members))  # of V * B prompts
        predicted = self.predict_noise(base.unet, noisy, timestep, conditioning)
        error = predicted.float().unflatten(0, (len(members), -1)) - target  # [V, B, C, H, W]
        return error.pow(2).flatten(1).mean(1)

    def _autocast(self) -> bool:
        """Autocast to bf16 where the Trainer asks for it, but never for finite differences: it would drown mu."""
        return self.trainer.precision == "bf16-mixed" and not self.estimator.forward_only

    def _loaded(self) -> Base:
        if self.base is None:
            raise UserError("the base is not loaded: call module.load() or let a Trainer set the module up")
        return self.base

    # -- after and between ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition_on(self, prompts: Sequence[str]) -> Conditioning:
        """What the U-Net is told of N prompts that may hold the trained token."""
        return condition_on(self._loaded(), prompts, self.adapter.tokens())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside trainables and optimiser: what the run was, and the subspace's history."""
        checkpoint["mep"] = describe(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check by hand (loading is not strict) that the checkpoint is of this run and complete.

        Raises:
            CheckpointError: another base, precision or setting, or something that is missing.
        """
        refuse_another_run(checkpoint, self)
        if self.subspace:
            self.subspace.load_state_dict(checkpoint["mep"]["subspace"])


def step_generator(seed: int, step: int) -> Generator:
    """A generator that is a pure function of (seed, step)."""
    return Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x27D4EB2F) % 2**63)


def _normal(like: Tensor, generator: Generator) -> Tensor:
    """fp32 normals of a tensor's shape, drawn on the CPU so that every device sees the same."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)
