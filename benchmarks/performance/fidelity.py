"""`fidelity`: how true a zeroth-order gradient is in every precision, on the embedded base.

A finite difference [L(theta + mu e) - L(theta)] / mu errs in two ways. Rounding: the two losses are nearly equal, and
what the arithmetic drops is divided by mu; it is measured against the same difference over the same weights in float64.
Truncation: the loss is no straight line; it is that float64 difference against the exact derivative <grad L, e>.
A tangent that is carried through the network (`ForwardGradientEstimator`) errs by rounding alone, against <grad L, e>.
"""

from __future__ import annotations

import copy
import functools
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, row
from mep_lightning.bases import Base, encode_prompts, load_base, predict_noise
from mep_lightning.data import sample_latents
from mep_lightning.estimators.perturbation import TANGENT, Tangents
from mep_lightning.kernels.tf32 import whole_products
from mep_lightning.quantization import Int8Linear, QuantizedWeight
from mep_lightning.tangents import Dual
from mep_lightning.tiny.subjects import other_photos, subject

MUS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
TIMESTEPS = (100, 300, 500, 700, 900)
TOKEN = "<sks>"
CARRIED = "tangents"
"""Stands where a finite difference has its mu."""


@dataclass(frozen=True)
class Path:
    """A precision of the weights, the activations' dtype, and whether linear layers round their activations to int8."""

    precision: str
    dtype: torch.dtype
    w8a8: bool = False

    def __str__(self) -> str:
        if self.precision in ("fp32", "bf16", "fp16"):
            return self.precision
        return f"{self.precision}, {'W8A8 linears, ' if self.w8a8 else ''}{str(self.dtype).split('.')[1]} activations"


PATHS = (
    Path("fp32", torch.float32),
    Path("fp16", torch.float16),
    Path("bf16", torch.bfloat16),
    *(Path("int8", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(Path("int8", dtype, w8a8=True) for dtype in (torch.float16, torch.bfloat16)),
    *(Path("int4", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
)


def run(directions: int = 16, device: str = "cpu") -> list[Row]:
    """Median relative errors over timesteps and directions, and how the differences correlate with the derivative."""
    rows = []
    for path in PATHS:
        base = load(path, device)
        for way, (rounding, truncation, correlation) in errors(base, directions).items():
            case = f"tiny {path} {way}"
            rows.append(row("fidelity", case, "rounding, median relative error", rounding, ""))
            rows.append(row("fidelity", case, "truncation, median relative error", truncation, ""))
            rows.append(row("fidelity", case, "correlation with the exact derivative", correlation, ""))
            print(f"{case}: rounding {rounding:.3%}, truncation {truncation:.3%}, r {correlation:.4f}", flush=True)
    return rows


def load(path: Path, device: str) -> Base:
    """The embedded base as a path computes it."""
    base = load_base("tiny", path.precision, device)
    base.dtype = path.dtype
    for part in (base.unet, base.text_encoders[0]):
        part.to(path.dtype)
    for layer in base.unet.modules():
        if path.w8a8 and isinstance(layer, Int8Linear):
            layer.multiplies_integers = True
    return base


def in_float64(base: Base) -> Base:
    """The same weights, all of the arithmetic in float64."""
    wide = copy.copy(base)
    wide.dtype = torch.float64
    plain = load_base("tiny", "fp32", base.device)
    wide.unet, wide.text_encoders = plain.unet.double(), [plain.text_encoders[0].double()]
    for ours, theirs in zip((base.unet, base.text_encoders[0]), (wide.unet, wide.text_encoders[0]), strict=True):
        _copy_weights(ours, theirs)
    return wide


@torch.no_grad()
def _copy_weights(packed: nn.Module, plain: nn.Module) -> None:
    for name, layer in plain.named_modules():
        twin = packed.get_submodule(name)
        for key, values in layer.named_parameters(recurse=False):
            is_packed = isinstance(twin, QuantizedWeight) and key == "weight"
            values.copy_(twin.dequantize(torch.float64) if is_packed else getattr(twin, key))


def errors(base: Base, directions: int = 16) -> dict[str, tuple[float, float, float]]:
    """For every mu and for tangents: rounding, truncation (median relative errors) and correlation with the exact
    derivative.

    Raises:
        AssertionError: the exact derivative is no derivative of the float64 loss.
    """
    wide = in_float64(base)
    who = subject(0)
    init = encoder_row(wide, who.class_word).cpu()
    tangents = Tangents(seed=0, step=0, n=directions)
    noises = torch.stack(list(tangents.noise_of(init.float()))).double()
    members = {f"mu {mu:g}": (mu, torch.cat([init[None], init + mu * noises])) for mu in MUS}
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in (*members, CARRIED)}
    for timestep in TIMESTEPS:
        theta = init.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(wide, theta[None], timestep)[0], theta)
        exact = (noises * gradient).flatten(1).sum(1)  # [n]
        with torch.no_grad():
            central = losses(wide, torch.stack([init + 1e-5 * noises[0], init - 1e-5 * noises[0]]), timestep)
            slope = (central[0] - central[1]) / 2e-5
            torch.testing.assert_close(slope, exact[0], rtol=1e-4, atol=1e-9)
            for way, (mu, thetas) in members.items():
                with whole_products():
                    at = [losses(side, thetas, timestep) for side in (base, wide)]
                ours, true = ((loss[1:] - loss[0]) / mu for loss in at)
                found[way] += zip(ours.tolist(), true.tolist(), exact.tolist(), strict=True)
            carried = losses(base, tangents.of(init.float()), timestep)
            assert isinstance(carried, Dual)
            slopes = (carried.tangents[:, 0] / TANGENT).tolist()
            found[CARRIED] += zip(slopes, exact.tolist(), exact.tolist(), strict=True)
    return {way: _summary(triples) for way, triples in found.items()}


def _summary(triples: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    rounding = statistics.median(abs(ours - true) / abs(true) for ours, true, _ in triples)
    truncation = statistics.median(abs(true - exact) / abs(exact) for _, true, exact in triples)
    ours, _, exact = zip(*triples, strict=True)
    return rounding, truncation, statistics.correlation(ours, exact)


def encoder_row(base: Base, word: str) -> Tensor:
    """The embedding of a word, [1, D]."""
    ids = base.tokenizers[0](word, add_special_tokens=False).input_ids
    return base.text_encoders[0].get_input_embeddings().weight[ids[:1]].detach().clone()


def losses(base: Base, members: Tensor, timestep: int) -> Tensor:
    """The denoising loss of every member [V, 1, D] on one photo -> [V], fp32 as in training, float64 in float64."""
    who = subject(0)
    wide = torch.promote_types(base.dtype, torch.float32)
    latents, noise = _photo()
    t = torch.tensor([timestep], device=base.device)
    noisy = base.scheduler.add_noise(latents, noise, t).to(base.device, base.dtype)
    tokens = {TOKEN: members.to(base.device, wide)}
    embeds = encode_prompts(base, [f"a photo of a {TOKEN} {who.class_word}"], tokens)
    error = predict_noise(base.unet, noisy, t, embeds).to(wide) - noise.to(base.device, wide)
    return error.pow(2).flatten(1).mean(1).double().cpu()


@functools.cache
def _photo() -> tuple[Tensor, Tensor]:
    """One photo's latents and the noise for it, fp32 [1, C, H, W]."""
    plain = load_base("tiny", "fp32")
    with torch.no_grad(), plain.borrowed_vae() as vae:
        posterior = vae.encode(other_photos(subject(0), 1) * 2 - 1).latent_dist
    latents = sample_latents(posterior.mean, posterior.std, torch.zeros_like(posterior.mean), plain.scaling_factor)
    return latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
