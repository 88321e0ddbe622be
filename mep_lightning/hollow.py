"""Hollowed Net (arXiv 2411.01179): the U-Net's middle is cut out, and what it would answer is computed beforehand.

Stage 1 runs the whole U-Net, without an adapter, over as many draws as there are samples, and keeps what the cut
answers in a file that is mapped into memory. Stage 2 frees the cut and trains the layers around it on those draws.
Pictures take two paths: the whole U-Net without the adapter up to the cut's exit, then the adapted layers around it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from mep_lightning.bases import Base, Conditioning, condition_on, predict_noise
from mep_lightning.bases.units import Cut, cuts, is_line, line
from mep_lightning.bases.walk import activation_at
from mep_lightning.draws import Draw
from mep_lightning.errors import UserError, human, refuse_unless
from mep_lightning.phases import phase
from mep_lightning.reading import read_json
from mep_lightning.run_folder import held, write_atomically

FAR = 0.05
"""How far from what was asked for the nearest cut may be."""
STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}
"""What a file holds of a dtype: its bits, as numpy has no bf16."""
FILE, PROGRESS = "activations.bin", "activations.json"
EVERY = 16
"""Samples between two looks at the disk: what is there after a kill is gone on from."""
PATIENCE = 10.0
"""Seconds that a run waits for another in the same folder: enough for one that finds all draws there."""


def nearest_cut(found: list[Cut], fraction: float) -> Cut:
    """The legal cut whose share of the parameters is nearest to `fraction`.

    Raises:
        UserError: none is near; the message names the ones next to it.
    """
    cut = min(found, key=lambda one: abs(one.fraction - fraction))
    if abs(cut.fraction - fraction) > FAR:
        below = [one.fraction for one in found if one.fraction < fraction][-1:]
        above = [one.fraction for one in found if one.fraction > fraction][:1]
        near = " and ".join(f"{share:.3f}" for share in below + above)
        raise UserError(f"HollowedActivations.fraction is {fraction:g}, and no cut is near: the nearest are {near}.")
    return cut


@dataclass
class Hollow:
    """What is cut out of a module's U-Net, and what it would have answered.

    Attributes:
        fraction: of the U-Net's parameters, as asked for.
        samples: how many draws stage 1 makes ready.
        cut: what is cut out; known once the base is.
        stored: memory-mapped [samples, B, C, H, W], once stage 1 began: the bits of `dtype`.
        is_ready: whether stage 1 is done.
    """

    fraction: float
    samples: int
    cut: Cut | None = None
    stored: Any = None
    dtype: torch.dtype = torch.float32
    is_ready: bool = False

    def inside(self, base: Base) -> list[nn.Module]:
        """The modules that are cut out.

        Raises:
            UserError: the U-Net is of another build, or has no cut near the fraction.
        """
        if not is_line(base.unet):
            raise UserError(
                f"{base.name}'s U-Net is of another build than what can be hollowed: leave HollowedActivations out"
            )
        self.cut = self.cut or nearest_cut(cuts(base.unet), self.fraction)
        return [unit.module for unit in line(base.unet)[self.cut.start : self.cut.stop]]

    def index(self, seed: int, step: int) -> int:
        """Which draw a step takes: all of them once a round, in an order of the round's own."""
        order = random.Random(f"mep hollow {seed} {step // self.samples}").sample(range(self.samples), self.samples)
        return order[step % self.samples]

    def activation(self, index: int) -> Tensor:
        """What the cut answers to a draw, [B, C, H, W]."""
        return torch.from_numpy(self.stored[index].copy()).view(self.dtype)

    def with_made_up(self, module: Any, draw: Draw) -> Draw:
        """A draw with an activation of the right shape that is zero."""
        return replace(draw, activation=torch.zeros_like(self.answer(module, draw)))

    # -- stage 1 -------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        module: Any,
        folder: Path,
        batch_of: Callable[[int], Any],
        announced: Callable[[int, int], None],
        told: Callable[[int], None],
    ) -> None:
        """Make every draw's activation ready; what an earlier run of the same left in the folder is gone on from.

        Several processes take turns at the draws; the folder must be one that all of them see.

        Args:
            module: loaded, its adapter attached.
            folder: where the file goes.
            batch_of: the batch of a draw.
            announced: before anything is written, how many bytes will be, and how many draws are there already.
            told: how many are done.

        Raises:
            UserError: the folder holds activations of another run, or one makes them there, or the disk is too small.
        """
        assert self.cut is not None
        draw = module.draw_at(batch_of(0), 0)
        like = self.answer(module, draw)
        self.dtype, kind = like.dtype, STORED[like.dtype]
        shape = (self.samples, *like.shape)
        path, progress = folder / FILE, folder / PROGRESS
        key = _fingerprint(module, self, [list(shape), list(draw.noisy.shape), draw.prompts])
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        ranks = module.ranks
        folder.mkdir(parents=True, exist_ok=True)
        refusal = f"another run makes activations in {folder}: wait until it trains, or name another folder"
        refused = None
        with ExitStack() as stack:
            if ranks.rank == 0:
                try:
                    stack.enter_context(held(folder, refusal, PATIENCE))
                except UserError as error:
                    refused = error
            if ranks.highest(int(refused is not None)):  # all wait for the first, and are refused with it
                raise refused or UserError(refusal)
            done = _done(progress, path, key, size)
            if done < self.samples:
                announced(size, done)
            ranks.wait()  # until all have read how much is done
            if done == 0 and ranks.rank == 0:
                progress.unlink(missing_ok=True)  # before there is a whole file of which nothing counts
                _reserve(path, size)
            ranks.wait()
            refuse_unless(path.is_file(), "HollowedActivations' folder", folder, "one that all processes see")
            self.stored = np.memmap(path, kind, "r+", shape=shape)
            with phase("precompute"):
                every = EVERY * ranks.world
                for first in range(done, self.samples, every):
                    last = min(first + every, self.samples)
                    for index in range(first + ranks.rank, last, ranks.world):
                        answer = self.answer(module, module.draw_at(batch_of(index), index)).cpu()
                        self.stored[index] = (answer.view(torch.int16) if kind == np.int16 else answer).numpy()
                        told(index + 1)
                    self.stored.flush()
                    ranks.wait()
                    if ranks.rank == 0:
                        write_atomically(progress, json.dumps({"key": key, "done": last}))
                ranks.wait()
            self.stored = np.memmap(path, kind, "r", shape=shape)
        self.is_ready = True

    @torch.no_grad()
    def answer(self, module: Any, draw: Draw) -> Tensor:
        """What the cut answers to a draw, [B, C, H, W]."""
        assert self.cut is not None
        with module.adapter.away():
            told = condition_on(module.base, draw.prompts)
            return activation_at(module.base.unet, draw.noisy, draw.timestep, told, self.cut)

    # -- pictures ------------------------------------------------------------------------------------------------------

    @contextmanager
    def two_paths(self, base: Base, adapter: Any) -> Iterator[None]:
        """Let the U-Net draw as it was trained, for the length of a `with`; what was freed comes back for it."""
        unet, cut = base.unet, self.cut
        assert cut is not None

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **given: Any) -> Any:
            times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
            added = given.get("added_cond_kwargs") or {}
            told = Conditioning(encoder_hidden_states, added.get("text_embeds"), base.vae_factor)
            with adapter.away():
                activation = activation_at(unet, sample, times, told, cut)
            answer = predict_noise(unet, sample, times, told, cut=cut, activation=activation)
            return UNet2DConditionOutput(answer) if given.get("return_dict", True) else (answer,)

        with base.whole():
            unet.forward = forward
            try:
                yield
            finally:
                del unet.forward


def _fingerprint(module: Any, hollow: Hollow, first: list[Any]) -> str:
    """What the activations hang on, `first` of the first draw; another of any of these is another run's."""
    base, data = module.base, getattr(module._trainer, "datamodule", None)
    photos = hashlib.sha256()
    for mean, std in (data.latents if data is not None else {}).values():
        photos.update(mean.numpy().tobytes())
        photos.update(std.numpy().tobytes())
    what = [
        base.address,
        base.precision,
        str(base.dtype),
        module.seed,
        str(hollow.cut),
        first,
        None if data is None else [data.seed, [module.named(text) for text in data.texts]],
        photos.hexdigest(),
    ]
    what += [type(module.timesteps).__name__, sorted(map(str, vars(module.timesteps).items()))]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _done(progress: Path, path: Path, key: str, size: int) -> int:
    """How many draws of the same run lie ready.

    Raises:
        UserError: those of another run do.
    """
    if not progress.is_file():
        return 0
    try:
        said = read_json(progress)
        theirs, done = said["key"], int(said["done"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0  # damaged: they are made again
    if not path.is_file():
        return 0
    if theirs != key:
        raise UserError(
            f"{path} holds activations of another base, precision, cut, number of samples, timesteps, batch, photos, "
            "prompts or seed: delete it, or name another folder"
        )
    return max(done, 0) if path.stat().st_size == size else 0


def _reserve(path: Path, size: int) -> None:
    """A file of so many bytes, which the disk holds from now on.

    Raises:
        UserError: it does not hold them.
    """
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    try:
        if size > free:
            raise OSError(errno.ENOSPC, "full")
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told here, not by a dead process
            file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"stage 1 of Hollowed Net writes {human(size)} to {path.parent}, and {human(free)} are free there: make "
            "room, or lower HollowedActivations.samples"
        ) from None
