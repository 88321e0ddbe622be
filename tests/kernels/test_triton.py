"""Every Triton kernel equals its reference, on odd shapes, with whatever it leaves unwritten poisoned.

Without a GPU they run in Triton's interpreter; `pytest -m gpu` runs the same tests compiled.
"""

import math
import os

import pytest
import torch

from mep_lightning import kernels
from mep_lightning.kernels.quantize_rows.reference import quantize_rows
from mep_lightning.kernels.zo_step import reference as zo_step

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest value


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton is not in its interpreter")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="no CUDA device")]),
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New memory holds NaN, or 77 where it holds integers, so that an element left unwritten shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def close(ours, exact, dtype):
    """Within the rounding of a dtype; exact in float64."""
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert not ours.isnan().any()
    assert (ours.double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("numel", [1, 4, 7, 1024, 1025])
@pytest.mark.parametrize("key", [(0, 0, 0), (0x1234567890ABCDEF, 5, 7), (3, 30_000, 2), (-1, 1, 2**32 - 1)], ids=str)
def test_philox_normal(key, numel, device):
    from mep_lightning.kernels.philox import triton

    seed, step, param_id = key
    members = [3, 4, 2**32 - 1, 0]
    out = torch.empty(len(members), numel, device=device)
    triton.philox_normal(seed, step, members, param_id, out)
    expected = kernels.philox_normal.reference(seed, step, members, param_id, numel)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (0x1234567890ABCDEF, 5, 3, 7), (-1, 1, 2**32 - 1, 2**32 - 1)], ids=str)
def test_tritons_philox_gives_the_definitions_integers(key, device):
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["seed", "step", "member", "param_id"])
    def words(out, seed, step, member, param_id):
        block = tl.arange(0, 64).to(tl.int64)
        zero = tl.zeros_like(block)
        c1, c2, c3 = (zero + step).to(tl.uint32), (zero + member).to(tl.uint32), (zero + param_id).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), c1, c2, c3)
        tl.store(out + 4 * block, w0.to(tl.int64))
        tl.store(out + 4 * block + 1, w1.to(tl.int64))
        tl.store(out + 4 * block + 2, w2.to(tl.int64))
        tl.store(out + 4 * block + 3, w3.to(tl.int64))

    out = torch.empty(256, dtype=torch.int64, device=device)
    words[(1,)](out, *key)
    assert torch.equal(out.cpu(), kernels.philox_uint32(*key, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1025), (2, 3, 3, 3)], ids=str)
def test_quantize_rows(shape, dtype, device):
    from mep_lightning.kernels.quantize_rows import triton

    x = torch.randn(shape).to(dtype)
    x[0] = 0 if len(x) > 1 else 1
    for source in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.T.contiguous().T):
        for ours, theirs in zip(triton.quantize_rows(source.to(device)), quantize_rows(x), strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_quantize_rows_of_a_row_that_is_no_number(device):
    from mep_lightning.kernels.quantize_rows import triton

    x = torch.randn(3, 1500)
    x[1, 1200] = math.nan
    (q, scale), (theirs, exact) = triton.quantize_rows(x.to(device)), quantize_rows(x)
    assert scale.isnan().tolist() == exact.isnan().tolist() == [False, True, False]
    assert torch.equal(scale[::2].cpu(), exact[::2]) and torch.equal(q[::2].cpu(), theirs[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 7), (33, 70, 65), (16, 32, 16), (130, 3, 129)], ids=str)
def test_int8_linear(shape, biased, dtype, device):
    from mep_lightning.kernels.int8_linear import triton

    rows, outputs, inputs = shape
    q, scale = quantize_rows(torch.randn(outputs, inputs))
    bias = torch.randn(outputs) if biased else None
    x = torch.randn(rows, inputs).to(dtype)
    on_device = [None if t is None else t.to(device) for t in (x, q, scale, bias)]
    exact = kernels.int8_linear.reference(x.double(), q, scale, bias)
    close(triton.int8_linear(*on_device).cpu(), exact, dtype)

    xq, x_scale = quantize_rows(x)
    arguments = [None if t is None else t.to(device) for t in (xq, x_scale, q, scale, bias)]
    exact = (xq.double() @ q.double().T) * x_scale.double()[:, None] * scale.double() + (0 if bias is None else bias)
    close(triton.int8_linear_w8a8(*arguments, dtype).cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_of_a_view(dtype, device):
    from mep_lightning.kernels.int8_linear import triton

    q, scale = quantize_rows(torch.randn(6, 7))
    x = torch.randn(3, 7, 5).to(dtype).transpose(1, 2)  # [3, 5, 7], not contiguous
    exact = kernels.int8_linear.reference(x.double(), q, scale)
    close(triton.int8_linear(x.to(device), q.to(device), scale.to(device), None).cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("image", "outputs", "kernel", "stride", "padding"),
    [
        ((1, 3, 5, 5), 4, (3, 3), (1, 1), (1, 1)),
        ((2, 17, 7, 9), 33, (3, 3), (2, 2), (1, 1)),
        ((2, 20, 4, 4), 8, (1, 1), (1, 1), (0, 0)),
        ((1, 4, 6, 8), 5, (3, 2), (1, 2), (2, 0)),
    ],
    ids=str,
)
def test_int8_conv2d(image, outputs, kernel, stride, padding, dtype, device):
    from mep_lightning.kernels.int8_conv2d import triton

    q, scale = quantize_rows(torch.randn(outputs, image[1], *kernel))
    bias, x = torch.randn(outputs), torch.randn(image).to(dtype)
    for b in (bias, None):
        exact = kernels.int8_conv2d.reference(x.double(), q, scale, b, stride, padding)
        for layout in (torch.contiguous_format, torch.channels_last):
            on_device = [None if t is None else t.to(device) for t in (x.to(memory_format=layout), q, scale, b)]
            close(triton.int8_conv2d(*on_device, stride, padding).cpu(), exact, dtype)


def orthonormal(k: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q.T.float().contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "d"), [(1, 2), (5, 40), (127, 768), (33, 4097)])
def test_subspace_project(k, d, dtype, device):
    from mep_lightning.kernels.subspace_project import triton

    basis, grad = orthonormal(k, d), torch.randn(d).to(dtype)
    exact = grad.double() - basis.double().T @ (basis.double() @ grad.double())
    projected = grad.to(device)
    assert triton.takes(projected, basis)
    triton.subspace_project_(projected, basis.to(device))
    assert (projected.cpu().double() - exact).abs().max() <= 3 * ROUNDING[dtype] * grad.abs().max()


@pytest.mark.parametrize(("n", "k", "d"), [(1, 0, 1), (2, 0, 5000), (2, 15, 128), (3, 127, 769), (8, 5, 1000)])
def test_zo_step(n, k, d, device):
    from mep_lightning.kernels.zo_step import triton

    basis = orthonormal(k, d) if k else None
    theirs = [torch.randn(d), torch.zeros(d), torch.zeros(d), torch.empty(d)]
    ours = [tensor.clone().to(device) for tensor in theirs]
    assert triton.takes(ours[0], basis)
    for update in range(1, 5):
        weights, step = torch.randn(n), torch.tensor([update * 1000])
        pace = torch.tensor([5e-3 / (1 - 0.9**update), math.sqrt(1 - 0.999**update)])
        settings = dict(seed=7, param_id=3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01)
        theta, *moments, grad = theirs
        zo_step.zo_step_(theta, weights, *moments, step, pace, **settings, basis=basis, grad=grad)
        theta, *moments, grad = ours
        on_device = [t.to(device) for t in (weights, step, pace)]
        held = None if basis is None else basis.to(device)
        triton.zo_step_(theta, on_device[0], *moments, *on_device[1:], **settings, basis=held, grad=grad)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank"), [(5, 7, 6, 1), (3, 8, 33, 4), (17, 68, 20, 5), (65, 12, 40, 16)], ids=str
)
def test_perturbed_lora_linear(rows, inputs, outputs, rank, dtype, device):
    from mep_lightning.kernels.perturbed_lora_linear import triton

    q, scale = quantize_rows(torch.randn(outputs, inputs))
    bias, a, b = torch.randn(outputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    probes = [(0, 0.0), (0, 1.0), (3, -1.0)]
    x = torch.randn(3 * rows, inputs).to(dtype)
    tail = (0.5, probes, 0.1, 7, 2, (1, 2))
    for held in (bias, None):
        exact = kernels.perturbed_lora_linear.reference(x.double().float(), q, scale, held, a, b, *tail).double()
        on_device = [None if t is None else t.to(device) for t in (x, q, scale, held, a, b)]
        ours = triton.perturbed_lora_linear(*on_device, *tail).cpu()
        assert ours.dtype == dtype and not ours.isnan().any()
        assert (ours.double() - exact).abs().max() <= 3 * ROUNDING[dtype] * exact.abs().max()


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 16), (33, 40, 20), (70, 77, 40), (17, 130, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_tangents(shape, dtype, device):
    from mep_lightning.kernels.attention_tangents import triton

    queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 2, n, 3, width) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype).transpose(2, 3) for size in sizes)
    k = k + torch.randn(3, 2, 3, 1, width, generator=generator).to(k)  # as keys have it: a part that all share
    ours = triton.attention_tangents(q, k, v)
    exact = kernels.attention_tangents.reference(q.double(), k.double(), v.double())
    for one, true in zip(ours, exact, strict=True):
        close(one, true, dtype)
    assert ours.transpose(2, 3).is_contiguous()


def stack_of(*shape, dtype, tangents=2, mean=0.0):
    """A value and tangents, the value around a mean."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(1 + tangents, *shape, generator=generator)
    made[0] += mean
    return made.to(dtype)


def parameters(channels, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 5, 7), 3), ((1, 8, 1, 1), 8), ((1, 20, 40, 33), 2), ((2, 4, 3, 3), 1)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_tangents(shape, groups, last, dtype, device):
    from mep_lightning.kernels.norm_tangents import triton

    x = stack_of(*shape, dtype=dtype, mean=3.0).to(device)
    if last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight, bias = (one.to(device) for one in parameters(shape[1], dtype))
    for gain, shift in ((weight, bias), (None, None), (weight, None)):
        ours = triton.group_norm_tangents(x, groups, gain, shift, 1e-5)
        wide = (None if one is None else one.double() for one in (gain, shift))
        for one, exact in zip(ours, kernels.group_norm_tangents.reference(x.double(), groups, *wide), strict=True):
            close(one, exact, dtype)


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 7), 3), ((1, 4, 1, 6), 4), ((1, 20, 40, 33), 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm(shape, groups, dtype, device):
    from mep_lightning.kernels.norm_tangents import triton

    x = stack_of(*shape, dtype=dtype, mean=3.0)[0].to(device)
    x = x.to(memory_format=torch.channels_last)
    weight, bias = (one.to(device) for one in parameters(shape[1], dtype))
    for gain, shift in ((weight, bias), (None, None)):
        (ours,) = triton.group_norm_tangents(x[None], groups, gain, shift, 1e-5)
        wide = (None if one is None else one.double() for one in (gain, shift))
        close(ours, kernels.group_norm.reference(x.double(), groups, *wide), dtype)
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu(dtype, device):
    from mep_lightning.kernels.geglu import triton

    for shape in ((2, 3, 40), (1, 2), (5, 4100)):
        x = stack_of(*shape, dtype=dtype)[0].mul(3).to(device)
        close(triton.geglu(x), kernels.geglu.reference(x.double()), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 2050), (70, 320), (4, 6, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(shape, dtype, device):
    from mep_lightning.kernels.dequantize import dequantize_reference, triton

    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(shape[0], generator=generator).to(device)
    for kept in [q, q.to(memory_format=torch.channels_last)] if q.dim() == 4 else [q]:
        ours = triton.dequantize(kept, scale, dtype)
        assert ours.stride() == kept.stride()
        if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter does not round
            close(ours, kept.double() * scale.double().view(-1, *[1] * (q.dim() - 1)), dtype)
        else:
            assert torch.equal(ours, dequantize_reference(kept, scale, dtype))


def test_group_norm_tangents_of_many_chunks(device, monkeypatch):
    from mep_lightning.kernels.norm_tangents import triton

    monkeypatch.setattr(triton, "TILE", 64)
    monkeypatch.setattr(triton, "CHUNKS", 4)
    x = stack_of(1, 6, 9, 11, dtype=torch.float32, mean=100.0).to(device)
    ours = triton.group_norm_tangents(x, 2, None, None, 1e-5)
    exact = kernels.group_norm_tangents.reference(x.double(), 2)
    assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 7), (3, 320), (2, 1030)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_tangents(rows, width, dtype, device):
    from mep_lightning.kernels.norm_tangents import triton

    wider = stack_of(2, rows, 2 * width, dtype=dtype, mean=3.0).to(device)
    weight, bias = (one.to(device) for one in parameters(width, dtype))
    for x in (wider[..., :width], wider[..., :width].contiguous()):
        for gain, shift in ((weight, bias), (None, None)):
            ours = triton.layer_norm_tangents(x, gain, shift, 1e-5)
            wide = (None if one is None else one.double() for one in (gain, shift))
            for one, exact in zip(ours, kernels.layer_norm_tangents.reference(x.double(), [width], *wide), strict=True):
                close(one, exact, dtype)


@pytest.mark.parametrize("function", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_tangents(function, dtype, device):
    from mep_lightning.kernels.pointwise_tangents import triton

    wider = stack_of(2, 3, 40, dtype=dtype).mul(3).to(device)
    image = wider.permute(0, 1, 3, 2)[..., None].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for x in (wider, wider[..., 20:], stack_of(2000, dtype=dtype).to(device), image, stack_of(dtype=dtype).to(device)):
        ours, exact = (
            triton.activation_tangents(x, function),
            kernels.activation_tangents.reference(x.double(), function),
        )
        for one, true in zip(ours, exact, strict=True):
            close(one, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_tangents(dtype, device):
    from mep_lightning.kernels.pointwise_tangents import triton

    wider = stack_of(2, 3, 40, dtype=dtype).to(device)
    left, right = wider.chunk(2, -1)
    for x, y in ((left, right), (left, right.contiguous()), (wider, wider.flip(-1))):
        exact = kernels.product_tangents.reference(x.double(), y.double())
        for one, true in zip(triton.product_tangents(x, y), exact, strict=True):
            close(one, true, dtype)
