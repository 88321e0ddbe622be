"""Several processes train one adapter: forward passes are shared out, and their losses, mere numbers, are exchanged.

Every rank holds the frozen base and the adapter. Directions, and with a selector the branch, are a pure function of
(seed, step), so that no noise and no gradient of a zeroth-order step need travel: each rank learns all losses and takes
the same update, bit by bit. A backward pass's gradients, of the adapter alone, are averaged.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from subprocess import Popen
from threading import Thread
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

from mep_lightning.errors import UserError, is_out_of_memory, refuse_unless

Shared = Literal["members", "data"]
SHARED: tuple[Shared, ...] = ("members", "data")
NAME, DATA, DDP = "zo_ddp", "zo_ddp_data", "ddp"
STRATEGIES: dict[str, Shared | None] = {NAME: "members", DATA: "data", DDP: None}
"""What each shares out of a zeroth-order step; Lightning's own averages gradients."""
COMPARED_EVERY = 100
"""Steps after which ranks make sure that they still hold the same: machines of two kinds may round otherwise."""
BUCKET = 1 << 24
"""Numbers of gradients that are exchanged together, 64 MiB of them: all at once would double a U-Net's."""
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: the first may draw pictures meanwhile."""


def tell_of_killed(processes: Sequence[Popen[bytes]], interval: float = 0.02) -> None:
    """Say on stderr when a signal kills one of the other processes; return then, or once all have ended by themselves.

    Lightning looks every five seconds, and then kills those that are left, the first among them, without a word.
    """
    left = list(processes)
    while left:
        for process in left:
            if (process.poll() or 0) < 0:
                name = signal.Signals(-process.returncode).name
                print(f"One of the processes that train together was killed ({name}): the others end.", file=sys.stderr)
                return
        left = [process for process in left if process.returncode is None]
        time.sleep(interval)


class ZerothOrderStrategy(DDPStrategy):
    """`Trainer(strategy="zo_ddp")`: zeroth-order steps, and mixed ones, over several processes.

    Launching, devices and nodes are Lightning's, as for `ddp`; nothing is wrapped, since what is trained has no
    gradient that hooks could reduce.

    Args:
        shared: "members" gives every rank the same photos, noise and timesteps and some of a step's members, so that a
            run is that of one process, sooner; "data" gives every rank all members and photos, noise and timesteps of
            its own, as many samples a step as there are ranks.
        given: DDPStrategy's, such as `timeout`.

    Raises:
        UserError: `shared` is neither.
    """

    strategy_name = NAME

    def __init__(self, shared: Shared = "members", **given: Any) -> None:
        refuse_unless(shared in SHARED, "ZerothOrderStrategy.shared", shared, f"one of {', '.join(SHARED)}")
        given.setdefault("timeout", PATIENCE)
        super().__init__(**given)
        self.shared: Shared = shared

    def setup_environment(self) -> None:
        """As DDPStrategy's, with an eye on the processes that Lightning has started."""
        if started := list(getattr(self._launcher, "procs", ())):
            Thread(target=tell_of_killed, args=(started,), daemon=True).start()
        super().setup_environment()

    def configure_ddp(self) -> None:
        """The module stays as it is."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As DDPStrategy's; Lightning waits at one after every checkpoint."""
        with _together(self.world_size):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As DDPStrategy's."""
        with _together(self.world_size):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As DDPStrategy's; Lightning asks all whether to stop."""
        with _together(self.world_size):
            return super().reduce(tensor, *args, **kwargs)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Who shares members sees the same photos, whatever data module they come from."""
        return {"num_replicas": 1, "rank": 0} if self.shared == "members" else super().distributed_sampler_kwargs


for _name, _shared in zip((NAME, DATA), SHARED, strict=True):
    StrategyRegistry.register(
        _name,
        ZerothOrderStrategy,
        description=f"Zeroth-order training over processes that share {_shared} and exchange losses",
        shared=_shared,
    )


class LostRankError(UserError):
    """Another process of the run died or did not answer in time; its own message says why."""


@contextmanager
def _together(world: int) -> Iterator[None]:
    """What all ranks do; where one is gone, that is what is told."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LostRankError(f"one of the {world} processes that train together is gone, or was too slow") from error


@dataclass
class Ranks:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: this one's number.
        world: how many there are.
        shared: what is shared out, see `ZerothOrderStrategy`; None under another strategy, as `ddp`, where every rank
            has data of its own and gradients are averaged.
        device: where what is exchanged lies.
        sent: bytes that this process has given so far.
    """

    rank: int = 0
    world: int = 1
    shared: Shared | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sent: int = 0

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """Those of a Trainer; one alone without a Trainer."""
        if trainer is None or trainer.world_size == 1:
            return cls()
        shared = getattr(trainer.strategy, "shared", None)
        return cls(trainer.global_rank, trainer.world_size, shared, trainer.strategy.root_device)

    @property
    def shares_members(self) -> bool:
        return self.world > 1 and self.shared == "members"

    @property
    def exchanges_losses(self) -> bool:
        return self.shared is not None

    @property
    def fills_buckets(self) -> bool:
        """Whether DDP keeps what is trained once more, as buckets for gradients."""
        return self.world > 1 and not self.exchanges_losses

    def index(self, step: int, shares_members: bool) -> int:
        """Which of the draws, of (seed, index), is this rank's in a step."""
        return step if shares_members or self.world == 1 else step * self.world + self.rank

    def gathered(self, mine: Tensor, places: Sequence[int], count: int) -> Tensor:
        """All numbers, [count], of which this rank has those at `places`; each is one rank's alone."""
        numbers = torch.zeros(count, dtype=mine.dtype, device=mine.device)
        numbers[torch.tensor(places, device=mine.device, dtype=torch.int64)] = mine
        self._reduce_(numbers)  # a number and zeros: exact
        return numbers

    def averaged_(self, numbers: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.world > 1:
            self._reduce_(numbers)
            numbers /= self.world
        return numbers

    def average_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """The mean of gradients over ranks, in place, a bucket at a time; where one is missing, it counts as zero."""
        if self.world > 1:
            for bucket in _in_buckets(parameters):
                self._average_together_(bucket)

    def _average_together_(self, trained: Sequence[Tensor]) -> None:
        grads = [torch.zeros_like(theta) if theta.grad is None else theta.grad for theta in trained]
        flat = self.averaged_(torch.cat([grad.float().flatten() for grad in grads]))
        for theta, grad, part in zip(trained, grads, flat.split([grad.numel() for grad in grads]), strict=True):
            theta.grad = grad.copy_(part.view(grad.shape))

    def highest(self, number: int) -> int:
        """The largest of all ranks' numbers, here in the host's memory: no rank goes on before all have come."""
        if self.world == 1:
            return number
        numbers = torch.tensor([number], dtype=torch.int64, device=self.device)
        self._reduce_(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def wait(self) -> None:
        """Until all ranks have come as far."""
        self.highest(0)

    def agreed(self, tensor: Tensor) -> Tensor:
        """The tensor, where all ranks hold the same down to the last bit; else the first's."""
        if self.hold_the_same([tensor]):
            return tensor
        theirs = [tensor.detach().cpu() if self.rank == 0 else None]  # of another shape, maybe
        with _together(self.world):
            dist.broadcast_object_list(theirs, 0)
        self.sent += tensor.nbytes
        assert theirs[0] is not None
        return theirs[0].to(tensor.device)

    def hold_the_same(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all ranks' tensors have the same bits, as far as their sums and number tell."""
        if self.world == 1:
            return True
        sums = [_bits(tensor.detach()).sum(dtype=torch.int64).cpu() for tensor in tensors]
        digest = sum(int(one) * 1_000_003**place for place, one in enumerate(sums, 1)) % 2**62
        seen = torch.tensor([digest, -digest], dtype=torch.int64, device=self.device)
        self._reduce_(seen, dist.ReduceOp.MAX)
        return bool(seen[0] == -seen[1])

    def _reduce_(self, numbers: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
        with _together(self.world):
            dist.all_reduce(numbers, how)
        self.sent += numbers.nbytes


def _in_buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters one after the other, as many together as have BUCKET numbers; a larger one alone."""
    bucket: list[Tensor] = []
    size = 0
    for theta in parameters:
        size += theta.numel()
        if bucket and size > BUCKET:
            yield bucket
            bucket, size = [], theta.numel()
        bucket.append(theta)
    if bucket:
        yield bucket


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, in any order."""
    flat = tensor.contiguous().flatten()
    return flat.view(torch.int32 if flat.element_size() == 4 else torch.uint8)


ALONE = Ranks()
"""A process that trains by itself."""
