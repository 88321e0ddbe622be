"""Cells as tasks of a Ray cluster: Ray says where and when, and begins again what was lost with a worker or a node.

A task hands its cells, a batch that trains together, to the `local` engine of the node that it runs on, so that a cell
that dies, hangs or runs out of memory is recorded there as by itself, and only what befalls the task itself, its worker
or node, is Ray's to retry.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mep_lightning.comparison.cells import Batch, halves
from mep_lightning.comparison.engines import Ended
from mep_lightning.comparison.engines.local import PATIENCE, LocalEngine
from mep_lightning.comparison.share import gpu_share
from mep_lightning.errors import UserError, human, reason
from mep_lightning.run_folder import TEMPORARY

AHEAD = 1000
"""Tasks that Ray is told of at once."""
OBJECTS = 100 * 2**20
"""Bytes of a local cluster's object store: records are small."""
Kind = tuple[str, int]
"""A method, and how many of its cells train together: what a task asks for hangs on them."""
GLANCE = 1e-4
"""The least of a GPU that a task can ask for: enough to see how large it is."""
SETTINGS = {
    "RAY_task_oom_retries": "0",  # what a node has no memory for would be tried without end
    "RAY_worker_niceness": "0",  # seconds are measured, as of local processes
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anyone
}
"""Of the environment, where it does not say otherwise; Ray reads them when it is imported."""


@dataclass(frozen=True)
class RayEngine:
    """Cells as tasks of a Ray cluster.

    Args:
        address: of the cluster, as for `ray.init`; None makes one of this machine and ends it afterwards.
        workers: batches at once at most; None leaves it to what the cluster has.
        timeout: seconds that a cell may take, from when its process begins; a batch, as many for each of its cells.
        threads: of torch in each process, and the CPUs that a batch asks for.
        retries: how often a batch is begun again whose worker or node was lost.
        reads: files and folders, beside the comparison's own, that cells read.
        peak: a method and how many of its cells train together -> bytes that they take on a GPU at their peak, or None
            where nothing is known.
        tell: told, in a line, what there is and what is asked of it.
    """

    address: str | None = None
    workers: int | None = None
    timeout: float | None = None
    threads: int = 1
    retries: int = 3
    reads: Sequence[Path] = ()
    peak: Callable[[str, int], int | None] = lambda method, together: None
    tell: Callable[[str], None] = print

    def run_all(self, batches: Sequence[Batch], logs: Path) -> Ended:
        """As `Engine.run_all`.

        Raises:
            UserError: no Ray, no cluster at the address, no node with so many CPUs, or one that does not see the files.
        """
        require()
        if not batches:
            return
        logs.mkdir(parents=True, exist_ok=True)
        with _cluster(self.address):
            asked = self._asked(dict.fromkeys(map(_kind, batches)), logs)
            yield from self._ended(batches, logs, asked)

    def _ended(self, batches: Sequence[Batch], logs: Path, asked: Mapping[Kind, Mapping[str, float]]) -> Ended:
        import ray

        task = ray.remote(max_retries=self.retries, retry_exceptions=False)(_run)
        there = LocalEngine(1, self.timeout, self.threads)
        waiting = deque((batch, asked[_kind(batch)]) for batch in batches)
        running: dict[Any, tuple[Batch, Mapping[str, float]]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (self.workers or AHEAD):
                    batch, ask = waiting.popleft()
                    name = batch[0].name + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
                    running[task.options(name=name, **ask).remote(batch, logs, there)] = batch, ask
                for ended in ray.wait(list(running), num_returns=1)[0]:
                    batch, ask = running.pop(ended)
                    if (records := self._records(ended, len(batch))) is not None:
                        yield from zip(batch, records, strict=True)
                    else:
                        waiting.extendleft((half, ask) for half in reversed(halves(batch)))
        finally:
            _stop(list(running))

    def _records(self, ended: Any, count: int) -> list[dict[str, Any]] | None:
        """What came of a task's cells, in their order; None where it died with several: halves may fare better."""
        import ray
        from ray import exceptions

        died = exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.LocalRayletDiedError
        try:
            return ray.get(ended)
        except (exceptions.OutOfMemoryError, *died) as error:
            if count > 1:
                return None
            if isinstance(error, exceptions.OutOfMemoryError):
                return [{"error": "out of memory, as Ray saw it coming on its node", "kind": "memory"}]
            again = f", and again at each of {self.retries} retries" if self.retries else ""
            return [{"error": f"its worker or node was lost{again}", "kind": "failed"}]
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            told = str(cause) if isinstance(cause, UserError) else reason(cause)
        except exceptions.RayError as error:
            told = f"{type(error).__name__}: {reason(error)}"
        return [{"error": told, "kind": "failed"}] * count

    def _asked(self, kinds: Iterable[Kind], logs: Path) -> dict[Kind, dict[str, float]]:
        """What a batch of every kind asks for, once the nodes were looked at.

        Raises:
            UserError: there is no node for them, or one that does not see a file.
        """
        nodes, has_gpus = _nodes(self.threads)
        smallest = _look(nodes, has_gpus, logs.parent, self.reads)
        asked: dict[Kind, dict[str, float]] = {kind: {"num_cpus": self.threads, "num_gpus": 0} for kind in kinds}
        line = f"Ray: {len(nodes)} node{'' if len(nodes) == 1 else 's'}; a cell asks for {self.threads} CPU"
        if smallest is not None:
            for kind, ask in asked.items():
                ask["num_gpus"] = gpu_share(self.peak(*kind), smallest)
            shares = ", ".join(f"{ask['num_gpus']:g} ({_told(*kind)})" for kind, ask in asked.items())
            line += f" and of a GPU of {human(smallest)} for {shares}"
        self.tell(f"{line}.")
        return asked


def _kind(batch: Batch) -> Kind:
    return batch[0].method, len(batch)


def _told(method: str, together: int) -> str:
    return method if together == 1 else f"{together} of {method} together"


def require() -> None:
    """Raises:
    UserError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray, which is not installed: pip install 'mep-lightning[sweep]'.")


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A cluster to run tasks in: the one that this process is connected to, the one at an address, or one of its own.

    Raises:
        UserError: none answers at the address.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    answer = signal.getsignal(signal.SIGTERM)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is None:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECTS, **quiet)
    else:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except Exception as error:  # of many kinds, all of which mean: not to be had
            raise UserError(
                f"--address {address}: no Ray cluster of this version answers there ({reason(error).rstrip('.')}); "
                "give HOST:PORT of its head, or auto on one of its nodes."
            ) from error
    # Of the main thread alone; Ray's own answer ends the cluster before cells save.
    with suppress(ValueError, TypeError):
        signal.signal(signal.SIGTERM, answer)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Whether anything listens at HOST:PORT: Ray itself would go on trying for minutes.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.rpartition("/")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _nodes(cpus: int) -> tuple[list[str], bool]:
    """The nodes that cells can run on, and whether those are ones with GPUs: all of them, where any has some.

    Raises:
        UserError: none has so many CPUs.
    """
    import ray

    fine = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus]
    if not fine:
        raise UserError(f"--threads {cpus}: no node of the Ray cluster has as many CPUs; give fewer.")
    with_gpus = [node for node in fine if node["Resources"].get("GPU", 0) > 0]
    return [node["NodeID"] for node in with_gpus or fine], bool(with_gpus)


def _look(nodes: Sequence[str], has_gpus: bool, root: Path, reads: Sequence[Path]) -> int | None:
    """Bytes of the smallest GPU, None where there is none; every node is asked whether it sees the files.

    Raises:
        UserError: one does not, or cannot run a task at all, as where this package is not installed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = root / f"{TEMPORARY}{uuid.uuid4().hex}"  # a folder of this name on the node's own disk holds none
    mark.touch()
    try:
        task = ray.remote(_seen)
        gpus = GLANCE if has_gpus else 0
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        looks = [task.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=where) for where in there]
        found = ray.get([look.remote([mark, *reads], has_gpus) for look in looks])
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a node of the Ray cluster cannot run a first task ({reason(error).rstrip('.')}); see that it has this "
            "version of mep-lightning, and memory."
        ) from error
    finally:
        mark.unlink(missing_ok=True)
    for host, missing, _ in found:
        if missing:
            path = root if missing[0] == mark else missing[0]
            raise UserError(
                f"{path}: the Ray node {host} does not see it; put it into a folder that all nodes share, under the "
                "same path."
            )
    return min((size for _, _, size in found if size is not None), default=None)


def _seen(paths: Sequence[Path], has_gpus: bool) -> tuple[str, list[Path], int | None]:
    """On a node: its name, which paths it does not see, and the bytes of its smallest GPU."""
    size = None
    if has_gpus:
        import torch

        size = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return socket.gethostname(), [path for path in paths if not path.exists()], size


def _run(batch: Batch, logs: Path, engine: LocalEngine) -> list[dict[str, Any]]:
    """On a node: the records of a batch, in a process that the task's own looks after."""
    if not logs.is_dir():  # of a node that came later
        raise UserError(f"{logs.parent}: the Ray node {socket.gethostname()} does not see it; share it with all nodes.")
    with closing(engine.run_all([batch], logs)) as ended:
        records = {cell.key: record for cell, record in ended}
    return [records[cell.key] for cell in batch]


def _stop(running: Sequence[Any]) -> None:
    """End tasks, and wait until they have saved what their cells have trained."""
    import ray

    if not running:
        return
    for task in running:
        ray.cancel(task)
    ray.wait(list(running), num_returns=len(running), timeout=PATIENCE + 10)
