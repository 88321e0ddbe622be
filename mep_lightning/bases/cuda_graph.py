"""A function of tensors as a CUDA graph: thousands of launches become one, with the same arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mep_lightning.errors import UserError, reason

WARM_UPS = 3
"""Calls before a capture: libraries choose their algorithms and Triton compiles in them."""

Function = Callable[..., Tensor]
Captured = tuple[tuple[Tensor, ...], Callable[[], None], Tensor]


@functools.cache
def capture_stream(device: torch.device) -> Any:
    """A device's one stream for captures: cuBLAS keeps a workspace for every stream that it saw."""
    return torch.cuda.Stream(device=device)


class CUDAGraphed:
    """Captures a function at its first call with tensors of some shapes; later calls copy theirs in and replay.

    What the function reads beside its arguments must stay where it is in memory. A captured graph keeps the memory of
    the function's activations.

    Args:
        function: tensors in, one tensor out; the same operations whatever the values.
        insists: whether a function that cannot be captured is an error; else it is called as it is.
    """

    def __init__(self, function: Function, insists: bool = True) -> None:
        self.function, self.insists = function, insists
        self._captured: dict[tuple[object, ...], Captured] = {}
        self._pool: Any = None  # of all graphs: an answer is copied out before another replays
        self._refused = False

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's answer.

        Raises:
            UserError: the function cannot be captured, and must be.
        """
        if self._refused:
            return self.function(*arguments)
        key = tuple((argument.shape, argument.dtype, argument.device) for argument in arguments)
        if key not in self._captured:
            try:
                self._captured[key] = self.capture(*arguments)
            except (UserError, torch.OutOfMemoryError) as error:
                if self.insists:
                    raise
                self.clear()
                rank_zero_warn(f"launching kernels one by one: {error}")
                self._refused = True
                return self.function(*arguments)
        inputs, replay, output = self._captured[key]
        for there, here in zip(inputs, arguments, strict=True):
            there.copy_(here, non_blocking=True)
        replay()
        return output.clone()

    def clear(self) -> None:
        """Give the memory of what was captured back."""
        self._captured.clear()
        self._pool = None

    def capture(self, *arguments: Tensor) -> Captured:
        """Tensors to copy arguments into, what replays the function on them, and where its answer appears."""
        inputs = tuple(argument.detach().clone() for argument in arguments)
        try:
            with torch.cuda.device(inputs[0].device):
                graph = torch.cuda.CUDAGraph()
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                beside = capture_stream(inputs[0].device)
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    for _ in range(WARM_UPS):
                        self.function(*inputs)
                torch.cuda.current_stream().wait_stream(beside)
                with torch.cuda.graph(graph, pool=self._pool, stream=beside):
                    output = self.function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be captured as a CUDA graph ({reason(error)}): set model.cuda_graph false"
            ) from error
        return inputs, graph.replay, output
