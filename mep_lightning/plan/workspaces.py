"""What libraries hold on a GPU beside tensors: cuBLAS' and cuDNN's workspaces, and blocks that the allocator rounds up.

A rehearsal cannot see them. PyTorch gives cuBLAS a workspace for every thread and stream that multiplies (32 MiB on a
Hopper, 8 on GPUs before it): autograd's thread has one of its own, and the stream on which a step is captured. cuDNN
borrows one for a convolution, and copies what is not in its order of memory; in the autoencoder that grows with the
picture. The figures bound what any recipe took above its plan on an H100, SD1.5 at 512 px: up to 156 MiB, and in the
autoencoder 307 in half precision and 528 in fp32 (benchmarks/results/cuda/memory-sd15-h100.json). On an H200, with
half precision channels last (memory-sd15.json, fewer recipes), half precision took up to 77 MiB in a step and 40 in the
autoencoder, fp32 155 and 132. A test holds both files to these bounds. The autoencoder's convolutions were of whole
pictures then; those of bands (`bases.bands`) are smaller, and were not measured yet.
"""

from __future__ import annotations

WORKSPACES = 160 * 2**20
"""Bytes, in every phase and precision."""
CONVOLUTIONS = 1.0
"""Of the autoencoder's activations, beside them: what whole pictures took is within it, until bands are measured."""


def workspaces(phase: str, activations: int) -> int:
    """Bytes beside a phase's tensors on a GPU, at most.

    Args:
        phase: of a run, as `rehearse` names them.
        activations: its bytes of them.
    """
    return WORKSPACES + (int(CONVOLUTIONS * activations) if phase in ("encode", "decode") else 0)
