"""What libraries hold on a GPU beside tensors: cuBLAS' and cuDNN's workspaces, and blocks that the allocator rounds up.

A rehearsal cannot see them. PyTorch gives cuBLAS a workspace for every thread and stream that multiplies (32 MiB on a
Hopper, 8 on GPUs before it): autograd's thread has one of its own, and the stream on which a step is captured. cuDNN
borrows one for a convolution, and copies what is not in its order of memory.
"""

from __future__ import annotations

WORKSPACES = 160 * 2**20
"""Bytes, in every phase and precision. Fifteen recipes of SD1.5 at 512 px took up to 158 MiB above their plan on an
H200, in the autoencoder up to 42 (benchmarks/results/cuda/memory-sd15.json, which a test holds to this bound)."""
