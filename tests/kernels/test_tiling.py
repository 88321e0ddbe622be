"""An autotuner's clock."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.gpu
def test_a_launch_is_timed_without_a_buffer_to_empty_the_cache():
    from mep_lightning.kernels.tiling import milliseconds

    small, large = torch.randn(2**16, device="cuda"), torch.randn(2**27, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quick, quickest, slowest = milliseconds(small.neg_, (0.5, 0.2, 0.8))
    slow, _, _ = milliseconds(large.neg_, (0.5, 0.2, 0.8))
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert 0 < quickest <= quick <= slowest and slow > 10 * quick
