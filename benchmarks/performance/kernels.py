"""`kernels`: every operation at SD1.5's layer sizes, beside what a library does for the same; equal numbers first.

On a GPU ours are Triton's kernels; on a CPU what the dispatch takes there. Where a library is faster, the dispatch
takes the library (`mep_lightning.kernels.status.WITH_RIVAL`), and the row says by how much.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from benchmarks.rows import Row, interleaved, median_ratio, row
from mep_lightning import kernels
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.bases.weights import memory_format
from mep_lightning.errors import UserError
from mep_lightning.kernels.dispatch import SWITCH
from mep_lightning.kernels.products import linear
from mep_lightning.tangents import Dual

MEMBERS = 3  # RGE with n = 2
HEADS = 8
TOKENS = {320: 64 * 64, 640: 32 * 32, 1280: 16 * 16}
"""Positions at each width of SD1.5's U-Net at 512 px."""
LORA_RANK = 4

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """An operation at a size: ours and theirs, which answer alike, and the work that no implementation can avoid.

    Attributes:
        name: operation and size.
        ours, theirs: to be timed; theirs is what one would call without this package.
        tolerance: relative to the largest value; None where ours draws other random numbers.
        flops, bytes: the least, for the roofline of this dtype's products; 0 where that is not what limits it.
    """

    name: str
    ours: Run
    theirs: Run
    tolerance: float | None
    flops: float = 0
    bytes: float = 0


def run(rounds: int = 15, device: str = "cpu") -> Iterator[Row]:
    """Seconds of ours and theirs at every size, and the share of the roofline's floor that ours reaches."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    ceiling, bandwidth = matmul_ceiling(dtype, device), copy_bandwidth(device)
    about = f"{str(dtype).split('.')[1]} on {device}"
    yield row("kernels", f"matrix product, {about}", "ceiling", ceiling, "FLOP/s")
    yield row("kernels", f"copy, {device}", "ceiling", bandwidth, "B/s")
    for case in cases(dtype, device):
        refuse_unlike(case)
        sides = {"ours": _with_triton(case.ours), "theirs": case.theirs}
        calls, replays = as_graphs(sides) if torch.device(device).type == "cuda" else (1, {})
        seconds = interleaved(replays or sides, rounds)
        ours, theirs = ([each / calls for each in seconds[side]] for side in sides)
        value = statistics.median(ours)
        name = f"{case.name}, {about}"
        ratio = median_ratio(theirs, ours)
        timed = {"timed": "replayed" if replays else "called"}
        yield row("kernels", name, "seconds a call", value, "s", statistics.median(theirs), ratio) | timed
        print(f"{name}: {ratio:.2f}x of the library's speed", flush=True)
        if floor := max(case.flops / ceiling, case.bytes / bandwidth):
            yield row("kernels", name, "share of the roofline", floor / value, "")


def as_graphs(sides: dict[str, Run], calls: int = 20) -> tuple[int, dict[str, Run]]:
    """So many calls of each side as one CUDA graph: a GPU's work is timed, not how fast a CPU launches it.

    Returns:
        How many, and what replays them; 1 and nothing where a side cannot be captured.
    """

    def repeated(call: Run) -> Tensor:
        for _ in range(calls):
            call()
        return torch.empty(0)

    replays: dict[str, Run] = {}
    for side, call in sides.items():
        here = torch.zeros(1, device="cuda")
        try:
            _, replays[side], _ = CUDAGraphed(lambda _, call=call: repeated(call)).capture(here)
        except UserError:
            return 1, {}
    return calls, replays


def refuse_unlike(case: Case) -> None:
    """Raise an AssertionError where ours and theirs do not answer alike: there is no figure for a wrong result."""
    if case.tolerance is None:
        return
    ours, theirs = _with_triton(case.ours)(), case.theirs()
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= case.tolerance, f"{case.name}: ours is off by {error:.2e} of the largest value"


def _with_triton(call: Run) -> Run:
    """Take Triton's kernel also where the dispatch prefers a library; what is measured shows whether it should."""

    def run() -> object:
        before = os.environ.get(SWITCH)
        os.environ[SWITCH] = "triton"
        try:
            return call()
        finally:
            if before is None:
                del os.environ[SWITCH]
            else:
                os.environ[SWITCH] = before

    return run


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """All of them, made one at a time so that memory holds one."""
    yield from linears(dtype, device)
    yield from convolutions(dtype, device)
    yield from attentions(dtype, device)
    yield from tangents(dtype, device)
    yield from rules(dtype, device)
    yield from plain(dtype, device)
    yield from lora(dtype, device)
    yield from updates(device)


def linears(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """W8A16 and W8A8 beside the weight dequantised for the moment, at attention's and the feed-forward's sizes."""
    sizes = [(width, out, TOKENS[width]) for width in TOKENS for out in (width, 8 * width)]
    for width, out, tokens in [*sizes, (768, 1280, 77)]:
        rows = MEMBERS * tokens
        x = torch.randn(rows, width, device=device, dtype=dtype)
        q, scale = kernels.quantize_rows(torch.randn(out, width, device=device))
        bias = torch.zeros(out, device=device, dtype=dtype)
        work = {"flops": 2.0 * rows * width * out, "bytes": x.element_size() * rows * (width + out) + q.numel()}

        def theirs(x=x, q=q, scale=scale, bias=bias):
            return F.linear(x, (q * scale[:, None]).to(x.dtype), bias)

        def ours(x=x, q=q, scale=scale, bias=bias):
            return kernels.int8_linear(x, q, scale, bias)

        def integers(x=x, q=q, scale=scale, bias=bias):
            return kernels.int8_linear_w8a8(x, q, scale, bias)

        size = f"[{rows}, {width}] to {out}"
        yield Case(f"int8_linear {size}", ours, theirs, 5e-3, **work)
        yield Case(f"int8_linear_w8a8 {size}", integers, theirs, 5e-2)


def convolutions(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """3x3 convolutions of every level, and a shortcut, beside the weight dequantised for the moment."""
    for inner, out, side, kernel in (
        (320, 320, 64, 3),
        (640, 640, 32, 3),
        (1280, 1280, 16, 3),
        (2560, 1280, 16, 3),
        (640, 320, 64, 1),
    ):
        layout = memory_format(torch.device(device), dtype)  # a base's
        x = torch.randn(MEMBERS, inner, side, side, device=device, dtype=dtype)
        q, scale = kernels.quantize_rows(torch.randn(out, inner, kernel, kernel, device=device))
        if x.is_cuda:  # on a CPU PyTorch is given the order that it takes by itself
            x, q = (tensor.contiguous(memory_format=layout) for tensor in (x, q))
        kept = q.contiguous(memory_format=layout)
        bias = torch.zeros(out, device=device, dtype=dtype)
        pad = kernel // 2
        flops = 2.0 * MEMBERS * side**2 * inner * out * kernel**2
        moved = x.element_size() * MEMBERS * side**2 * (inner + out) + q.numel()

        def theirs(x=x, q=q, scale=scale, bias=bias, pad=pad):
            return F.conv2d(x, (q * scale[:, None, None, None]).to(x.dtype), bias, padding=pad)

        def ours(x=x, q=kept, scale=scale, bias=bias, pad=pad):
            return kernels.int8_conv2d(x, q, scale, bias, 1, pad)

        size = f"[{MEMBERS}, {inner}, {side}, {side}] to {out}, {kernel}x{kernel}"
        yield Case(f"int8_conv2d {size}", ours, theirs, 5e-3, flops, moved)


def attentions(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Self-attention of every level, and cross-attention of the first, beside PyTorch's own."""
    for width, keys in [*TOKENS.items(), (320, 77)]:
        queries = TOKENS[width]
        q, k, v = (
            torch.randn(MEMBERS, n, HEADS, width // HEADS, device=device, dtype=dtype).transpose(1, 2)
            for n in (queries, keys, keys)
        )
        flops = 4.0 * MEMBERS * queries * keys * width
        moved = 2.0 * MEMBERS * width * (queries + keys) * q.element_size()
        name = f"attention [{MEMBERS}, {HEADS}, {queries}, {width // HEADS}] over {keys}"

        def ours(q=q, k=k, v=v):
            return kernels.attention(q, k, v)

        def theirs(q=q, k=k, v=v):
            return F.scaled_dot_product_attention(q, k, v)

        yield Case(name, ours, theirs, 5e-3, flops, moved)


def tangents(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Attention with two tangents, beside forward-mode AD of its definition, a direction after the other."""
    for width, keys in [*TOKENS.items(), (320, 77)]:
        queries = TOKENS[width]
        q, k, v = (
            torch.randn(MEMBERS, 1, n, HEADS, width // HEADS, device=device, dtype=dtype).transpose(2, 3)
            for n in (queries, keys, keys)
        )
        flops = 2.0 * (2 + 4 * (MEMBERS - 1)) * queries * keys * width
        moved = 2.0 * MEMBERS * width * (queries + keys) * q.element_size()
        name = f"attention_tangents [{MEMBERS}, {HEADS}, {queries}, {width // HEADS}] over {keys}"

        def ours(q=q, k=k, v=v):
            return kernels.attention_tangents(q, k, v)

        def theirs(q=q, k=k, v=v):
            values = (q[0], k[0], v[0])
            found = [jvp(kernels.attention.reference, values, (q[i], k[i], v[i])) for i in range(1, MEMBERS)]
            return torch.stack([found[0][0], *(tangent for _, tangent in found)])

        yield Case(name, ours, theirs, 5e-3, flops, moved)


def rules(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Norms, activations and GEGLU's product with two tangents, beside forward-mode AD, a direction after the other."""
    for width, tokens in TOKENS.items():
        side = round(tokens**0.5)
        image = torch.randn(MEMBERS, 1, side, side, width, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
        rows = torch.randn(MEMBERS, 1, tokens, width, device=device, dtype=dtype)
        halves = torch.randn(MEMBERS, 1, tokens, 8 * width, device=device, dtype=dtype)
        gain = torch.ones(width, device=device, dtype=dtype)
        layers: list[tuple[str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor], float]] = [
            ("group_norm_tangents", image, lambda x, gain=gain: F.group_norm(x, 32, gain, gain), 1),
            ("layer_norm_tangents", rows, lambda x, gain=gain, width=width: F.layer_norm(x, [width], gain, gain), 1),
            ("activation_tangents", image, F.silu, 1),
            ("product_tangents", halves, lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), 0.5),
        ]
        for name, x, layer, share in layers:

            def ours(x=x, layer=layer):
                return layer(Dual(x)).stack

            whole = x.contiguous()  # forward-mode AD's group norm takes no other order

            def theirs(x=whole, layer=layer):
                found = [jvp(layer, (x[0],), (x[i],)) for i in range(1, MEMBERS)]
                return torch.stack([found[0][0], *(tangent for _, tangent in found)])

            moved = (1 + share) * x.numel() * x.element_size()
            yield Case(f"{name} {list(x.shape)}", ours, theirs, 5e-3, 10.0 * x.numel(), moved)


def plain(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Dequantisation, and a group norm and GEGLU's gate, channels last, beside PyTorch's own."""
    for outputs, length in ((320, 320), (2560, 320), (10240, 1280), (320, 2880), (1280, 11520), (1280, 23040)):
        q, scale = kernels.quantize_rows(torch.randn(outputs, length, device=device))

        def dequantized(q=q, scale=scale):
            return kernels.dequantize(q, scale, dtype)

        def multiplied(q=q, scale=scale):
            return torch.mul(q, scale[:, None], out=torch.empty_like(q, dtype=dtype))

        work = {"bytes": (1.0 + dtype.itemsize) * q.numel()}
        yield Case(f"dequantize [{outputs}, {length}]", dequantized, multiplied, 5e-3, **work)
    for width, tokens in TOKENS.items():
        side = round(tokens**0.5)
        image = torch.randn(MEMBERS, width, side, side, device=device, dtype=dtype)
        image = image.to(memory_format=torch.channels_last)
        halves = torch.randn(MEMBERS * tokens, 8 * width, device=device, dtype=dtype)
        gain = torch.ones(width, device=device, dtype=dtype)
        for kernel, arguments, share in (
            (kernels.group_norm, (image, 32, gain, gain), 2),
            (kernels.geglu, (halves,), 1.5),
        ):

            def ours(kernel=kernel, arguments=arguments):
                return kernel(*arguments)

            def theirs(kernel=kernel, arguments=arguments):
                return kernel.reference(*arguments)

            x = arguments[0]
            moved = share * x.numel() * x.element_size()
            yield Case(f"{kernel.__name__} {list(x.shape)}", ours, theirs, 5e-3, 5.0 * x.numel(), moved)


def lora(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """All members' LoRA in one product beside a product a member."""
    probes = [(0, 0.0), *((i, 1.0) for i in range(MEMBERS - 1))]
    for width, tokens in TOKENS.items():
        x = torch.randn(MEMBERS, tokens, width, device=device, dtype=dtype)
        q, scale = kernels.quantize_rows(torch.randn(width, width, device=device))
        a, b = (torch.randn(shape, device=device) for shape in ((LORA_RANK, width), (width, LORA_RANK)))

        def ours(x=x, q=q, scale=scale, a=a, b=b):
            return kernels.perturbed_lora_linear(x, q, scale, None, a, b, 1.0, probes, 1e-3, 0, 0, (0, 1))

        def theirs(x=x, q=q, scale=scale, a=a, b=b):
            outputs = []
            for member, (i, sign) in zip(x, probes, strict=True):
                moved = [
                    factor + sign * 1e-3 * kernels.philox_normal(0, 0, i, p, factor.numel(), x.device).view_as(factor)
                    for p, factor in enumerate((a, b))
                ]
                low = member.float() @ moved[0].T @ moved[1].T
                outputs.append((F.linear(member, (q * scale[:, None]).to(x.dtype)).float() + low).to(x.dtype))
            return torch.stack(outputs)

        flops = 2.0 * MEMBERS * tokens * width * (width + 2 * LORA_RANK)
        moved = x.element_size() * MEMBERS * tokens * 2 * width + q.numel()
        name = f"perturbed_lora_linear [{MEMBERS}, {tokens}, {width}] r={LORA_RANK}"
        yield Case(name, ours, theirs, 5e-3, flops, moved)


def updates(device: str) -> Iterator[Case]:
    """Noise, quantiser, projection, and the update in one launch beside its parts one after the other."""
    for numel in (2 * 768, 26_600_000):
        yield Case(
            f"philox_normal {numel}",
            lambda numel=numel: kernels.philox_normal(0, 0, 0, 0, numel, torch.device(device)),
            lambda numel=numel: torch.randn(numel, device=device),
            None,
            bytes=4.0 * numel,
        )
    sizes = dict.fromkeys(range(160), 2560)

    def one_by_one() -> Tensor:
        return torch.stack([kernels.philox_normal(0, 0, 0, i, 2560, torch.device(device)) for i in sizes])

    def together() -> Tensor:
        drawn = kernels.philox_normals(0, 0, [0], sizes, torch.device(device))
        return torch.cat([drawn[i] for i in sizes])

    yield Case("philox_normals 160 x 2560", together, one_by_one, 0.0, bytes=4.0 * 160 * 2560)
    weight = torch.randn(1280, 1280 * 9, device=device)

    def quantized() -> Tensor:
        return kernels.quantize_rows(weight)[0]

    def plainly() -> Tensor:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round().clamp(-127, 127).to(torch.int8)

    yield Case("quantize_rows [1280, 11520]", quantized, plainly, 1 / 127, bytes=5.0 * weight.numel())

    basis = torch.linalg.qr(torch.randn(768, 100, device=device))[0].T.contiguous()
    grad = torch.randn(1, 768, device=device)
    yield Case(
        "subspace_project_ [768], 100 directions",
        lambda: kernels.subspace_project_(grad.clone(), basis),
        lambda: grad - (grad @ basis.T) @ basis,
        1e-5,
        bytes=4.0 * basis.numel(),
    )
    weights, pace = torch.tensor([0.3, -0.2], device=device), torch.tensor([5e-3 / 0.1, 0.001**0.5], device=device)
    now = torch.tensor([3], device=device)

    theta, first, second, kept = (torch.zeros_like(grad) for _ in range(4))
    other = torch.nn.Parameter(torch.zeros_like(grad))
    adam = torch.optim.Adam([other], lr=5e-3, eps=1e-3)

    def fused() -> Tensor:
        return kernels.zo_step_(theta, weights, first, second, now, pace, 0, eps=1e-3, basis=basis, grad=kept)

    def apart() -> Tensor:
        noises = kernels.philox_normal(0, 3, [0, 1], 0, 768, torch.device(device))
        total = (weights[:, None] * noises).sum(0)[None]
        other.grad = total - (total @ basis.T) @ basis
        adam.step()
        return other.detach()

    yield Case("zo_step_ [768], n=2", fused, apart, 1e-4, bytes=4.0 * basis.numel())  # alike in their first update


def matmul_ceiling(dtype: torch.dtype, device: str, side: int = 4096, rounds: int = 10) -> float:
    """The most FLOP/s that a large matrix product reaches here, whichever library computes it."""
    side = side if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * side**3 / min(interleaved({"product": lambda: linear(a, b)}, rounds)["product"])


def copy_bandwidth(device: str, rounds: int = 10) -> float:
    """The most bytes a second that a large copy reads and writes here."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / min(interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])
