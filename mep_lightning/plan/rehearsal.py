"""A run played through with tensors that hold nothing: how much memory each of its phases would take.

The real module, on a base of the real size, in fake tensors: no weights are read, no GPU is needed, seconds suffice.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import Base, BaseFolder, predict_noise, remember
from mep_lightning.bases.load import assemble
from mep_lightning.bases.skeleton import made_up, skeleton_vae, tokenizer, unwritten
from mep_lightning.bases.streaming import streamed_bytes
from mep_lightning.bases.weights import Half
from mep_lightning.distributed import ALONE, Ranks
from mep_lightning.draws import Draw, step_generator
from mep_lightning.estimation import shared_losses
from mep_lightning.estimators import Backprop, Estimator, ZerothOrderEstimator
from mep_lightning.estimators.perturbation import Members
from mep_lightning.module import PersonalizationModule
from mep_lightning.plan.answers import Answers
from mep_lightning.plan.tracker import LiveBytes
from mep_lightning.plan.transient import transient
from mep_lightning.plan.workspaces import WORKSPACES
from mep_lightning.subject_batch import SubjectBatch

PROMPT = "a photo of {}"
PACKED = 4096
"""Elements from which on bitsandbytes' 8-bit Adam packs a parameter's moments."""
WORD = "ball"
"""What the subject is: a word of the tokenizer that stands in for the base's own."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that a phase holds, and what for.

    Attributes:
        weights, activations, gradients, optimizer: of tensors.
        buckets: the copy of gradients that DDP keeps.
        workspaces: what a GPU's libraries hold beside tensors, at most (`plan.workspaces`).
    """

    weights: int
    activations: int
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0
    workspaces: int = 0

    @property
    def total(self) -> int:
        """Of tensors."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations

    @property
    def needed(self) -> int:
        """With libraries' workspaces."""
        return self.total + self.workspaces


Phases = dict[str, Peak]
"""Of a run, in their order."""


@dataclass(frozen=True)
class _Setting:
    """What a rehearsal is of: `found` the base, `resolution` of photos in px, `pictures` denoised at once, `live` the
    bytes, `subjects` in a batch."""

    live: LiveBytes
    found: BaseFolder
    resolution: int
    batch_size: int
    pictures: int
    subjects: int

    @property
    def on_gpu(self) -> bool:
        return self.found.device.type == "cuda"

    def peak(self, run: Callable[[], object], **held: int) -> Peak:
        """What something takes beside what is held already."""
        gc.collect()
        self.live.reset_peak()
        run()
        return Peak(**held, activations=max(self.live.peak - sum(held.values()), 0))

    def with_workspaces(self, phases: Phases) -> Phases:
        """Phases beside which a GPU's libraries hold theirs."""
        if not self.on_gpu:
            return phases
        return {name: replace(peak, workspaces=WORKSPACES) for name, peak in phases.items()}


def rehearse(
    modules: Iterable[PersonalizationModule],
    found: BaseFolder,
    resolution: int,
    *,
    batch_size: int = 1,
    pictures: int = 1,
    subjects: int = 1,
) -> list[Phases]:
    """Play runs through that differ in their module alone.

    Args:
        modules: fresh, as recipes make them; each takes the fake base and is of no use afterwards. Of several `ranks`
            the one is played that takes most.
        found: the base, its precision, and its dtype, device and offload as they will be.
        resolution: side of the photos in px; pictures are drawn at the base's own.
        batch_size: samples a step.
        pictures: how many are denoised at once when samples are drawn, each twice for the guidance.
        subjects: that train in one batch, as in a `SubjectBatch`.

    Raises:
        UserError: a module cannot train in such a batch.

    Returns:
        For every module the peak of every phase: encode, load, step, denoise, decode; text where prompts are embedded
        beforehand, "low step" where there is a branch of low resolution, precompute where the U-Net is hollowed.
    """
    sizes = {"batch_size": batch_size, "pictures": pictures, "subjects": subjects}
    runs = rehearse_offloads(modules, found, resolution, **sizes)
    return [phases[found.offload] for phases in runs]


def rehearse_offloads(
    modules: Iterable[PersonalizationModule],
    found: BaseFolder,
    resolution: int,
    *,
    batch_size: int = 1,
    pictures: int = 1,
    subjects: int = 1,
) -> list[dict[str, Phases]]:
    """As `rehearse`, for every offload: only the place of weights differs, so that one play tells of all.

    Returns:
        For every module: offload -> the peak of every phase.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes(inside=partial(transient, on_cpu=found.device.type == "cpu"), answer=Answers(fakes))
    # Fakes of a CUDA device would need a CUDA build of torch.
    host = replace(found, device=torch.device("cpu"), offload="none")
    setting = _Setting(live, found, resolution, batch_size, pictures, subjects)
    gc.collect()
    was_frozen = gc.get_freeze_count() > 0  # by whoever wants it to stay so
    gc.freeze()  # what was there before is not looked through again and again
    try:
        with fakes, live:
            return _rehearse(setting, host, list(modules))
    finally:
        if not was_frozen:
            gc.unfreeze()


def _rehearse(setting: _Setting, host: BaseFolder, modules: list[PersonalizationModule]) -> list[dict[str, Phases]]:
    live = setting.live
    readers = {id(module): module.adapter.trains_text for module in modules}
    found: dict[int, dict[str, Phases]] = {}
    encode, encoder_arena = _autoencoder(setting, host, "encoder")
    decode, decoder_arena = _autoencoder(setting, host, "decoder")
    gc.collect()
    live.reset_peak()
    base = assemble(host, tensors=lambda part, _: made_up(part, unwritten), tokenizer=tokenizer, vae=None)
    packing = live.peak - live.now
    for reads_text in (True, False):
        text, text_arena = ({}, 0) if reads_text else _read_once(setting, base)
        arena = sum(map(streamed_bytes, (base.unet, *base.text_encoders)))
        gc.collect()
        resident, drawn = live.now, {}  # type: tuple[int, dict[object, int]]
        before = {"encode": encode, **text, "load": Peak(resident, packing)}
        for module in modules:
            if readers[id(module)] is not reads_text:
                continue
            training = _training(setting, module, base, drawn)
            waiting = {name: replace(peak, weights=peak.weights - resident + arena) for name, peak in training.items()}
            # On a GPU the U-Net is parked while pictures are decoded; streamed weights keep their arenas there.
            beside = 0 if setting.on_gpu else training["denoise"].weights
            whole = {**before, **training, "decode": _decoding(decode, training["denoise"], beside)}
            streamed = {
                "encode": replace(encode, weights=encoder_arena),
                **{name: replace(peak, weights=text_arena) for name, peak in text.items()},
                "load": Peak(arena, 0),
                **waiting,
            }
            vae = replace(decode, weights=decoder_arena)
            streamed["decode"] = _decoding(vae, waiting["denoise"], waiting["denoise"].weights)
            # A CPU's weights are in its own memory either way, as long as there is room.
            ways = {"none": whole, "stream": streamed if setting.on_gpu else whole}
            found[id(module)] = {offload: setting.with_workspaces(phases) for offload, phases in ways.items()}
    return [found[id(module)] for module in modules]


@torch.no_grad()
def _autoencoder(setting: _Setting, host: BaseFolder, half: Half) -> tuple[Peak, int]:
    """Encoding a photo or decoding a picture with that half, and what its streamed weights take on the device."""
    gc.collect()
    before = setting.live.now
    vae = skeleton_vae(host, unwritten, half)
    held = setting.live.now
    if half == "encoder":
        channels, side = 3, setting.resolution
    else:
        channels, side = vae.config.latent_channels, host.resolution // host.vae_factor
    picture = torch.empty(1, channels, side, side, dtype=vae.dtype)
    run = vae.encode if half == "encoder" else vae.decode
    peak = setting.peak(lambda: run(picture), weights=held)
    return replace(peak, weights=held - before), streamed_bytes(vae)


def _decoding(decode: Peak, denoise: Peak, beside: int) -> Peak:
    """Decoding pictures in the middle of a run, with weights beside: what training keeps between steps stays."""
    return replace(denoise, weights=decode.weights + beside, activations=decode.activations)


def _read_once(setting: _Setting, base: Base) -> tuple[Phases, int]:
    """Embedding prompts beforehand: the text encoders come alone, and are gone afterwards; and as `_autoencoder`."""
    weights, arena = (sum(map(size, base.text_encoders)) for size in (_bytes, streamed_bytes))
    reading = setting.peak(lambda: remember(base, [PROMPT]), weights=setting.live.now)
    base.release_text_encoders()
    return {"text": replace(reading, weights=weights)}, arena


def _training(setting: _Setting, module: PersonalizationModule, base: Base, drawn: dict[object, int]) -> Phases:
    """A step of every branch, and drawing samples; `drawn` keeps what drawing takes with the same things trained."""
    live = setting.live
    together = [module, *(copy.deepcopy(module) for _ in range(setting.subjects - 1))]
    gc.collect()
    for one in together:
        _attach(one, base)
    if not module.adapter.trains_text:
        remember_made_up(base, [module.named(PROMPT)])
    held, kept, peaks = {"weights": live.now}, _buckets(module), {}
    held["buckets"] = live.now - held["weights"]
    if module.hollow is not None:  # before Adam's first step
        peaks["precompute"] = setting.peak(partial(_precompute, module, setting), **held)
    kept += [moment for one in together for moment in state(one)]
    held["optimizer"] = live.now - sum(held.values())
    hollowed = _hollowed_bytes(module, base)
    for name, estimator, resolution in branches(module, setting.resolution):
        gradients = sum(_gradients(one, estimator) for one in together)
        batch = made_up_batch(base, resolution, setting.batch_size)
        if len(together) > 1:
            run = partial(gradients_together, SubjectBatch(together), [batch] * len(together))
        else:
            run = partial(gradient, module, estimator, draw_of(module, estimator, batch))
        for ranks in _played(module.ranks, estimator):
            module.ranks = ranks
            peak = setting.peak(run, **held, gradients=gradients)
            for one in together:
                one.adapter.zero_grad()
            peaks[name] = max(peaks.get(name, peak), peak, key=lambda peak: peak.total)
        peaks[name] = replace(peaks[name], weights=peaks[name].weights - hollowed)
    trained = module.adapter.numbered()
    kind = (
        *map(type, module.adapter.parts),
        *((id, theta.shape, theta.dtype) for id, theta in trained.items()),
        hollowed,
    )
    if kind not in drawn:
        side = base.resolution // base.vae_factor
        drawn[kind] = setting.peak(lambda: denoise(module, side, setting.pictures), **held).activations
    peaks["denoise"] = Peak(**held, activations=drawn[kind])
    del kept, trained, run
    for one in together:
        one.adapter.detach()
        del one.adapter  # what it trains is gone before the next one comes
        one.base = None
    return peaks


def _attach(module: PersonalizationModule, base: Base) -> None:
    """Make a module ready for a made-up base."""
    module.class_word = WORD
    for part in module.adapter.parts:
        if isinstance(part, TokenEmbedding):
            part.init = WORD
    module.take(base)
    module.predict_noise = predict_noise  # a rehearsal under `torch.compile` would spoil the compilation of the run


class Unheard(Ranks):
    """Ranks seen from one that hears of no other: what they exchange stays its own."""

    def _reduce_(self, numbers: Tensor, how: Any = None) -> None:
        """Nothing."""


def _played(ranks: Ranks, estimator: Estimator) -> list[Ranks]:
    """The ranks one of which takes most: the first has most members, the second none that stands at theta itself."""
    if ranks.world == 1:
        return [ranks]
    several = ranks.shares_members and estimator.forward_only
    return [Unheard(rank, ranks.world, ranks.shared) for rank in range(2 if several else 1)]


def _buckets(module: PersonalizationModule) -> list[Tensor]:
    """What DDP keeps from its beginning on: room for every gradient once more, in buckets of many."""
    trained = module.adapter.numbered().values() if module.ranks.fills_buckets else []
    return [torch.empty_like(theta, requires_grad=False) for theta in trained]


def _gradients(module: PersonalizationModule, estimator: Estimator) -> int:
    """Bytes of gradients beside activations: those from forward passes are made after them, many in registers."""
    trained = module.adapter.numbered().values()
    if estimator.forward_only and len(trained) > 1:
        return 0
    return sum(theta.numel() * theta.element_size() for theta in trained)


def state(module: PersonalizationModule) -> list[Tensor]:
    """What Adam and the subspace keep: two moments of every trained parameter, the path and its basis."""
    if module.estimator.moves_itself:
        return []
    trained = module.adapter.numbered().values()
    packs = module.optimizer == "adam8bit"
    kept = [
        torch.zeros_like(theta, dtype=torch.uint8 if packs and theta.numel() >= PACKED else theta.dtype)
        for theta in trained
        for _ in range(2)
    ]
    if module.subspace is not None:
        kept += [torch.zeros(module.subspace.kept(theta.numel())) for theta in trained]
    return kept


def branches(module: PersonalizationModule, resolution: int) -> list[tuple[str, Estimator, int]]:
    """The steps that there are, each with its estimator and its pictures' side in px."""
    high = ("step", module.estimator, resolution)
    return [high] if module.selector is None else [high, ("low step", module.low_estimator, module.low_resolution)]


def _hollowed_bytes(module: PersonalizationModule, base: Base) -> int:
    """What is freed of the U-Net before the first step."""
    return 0 if module.hollow is None else sum(_bytes(part) for part in module.hollow.inside(base))


def _precompute(module: PersonalizationModule, setting: _Setting) -> None:
    assert module.hollow is not None and module.base is not None
    batch = made_up_batch(module.base, setting.resolution, setting.batch_size)
    module.hollow.answer(module, module.draw_for(batch, True, step_generator(0, 0)))


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


def made_up_batch(base: Base, resolution: int, batch_size: int = 1) -> dict[str, Any]:
    """A batch as `SubjectData` gives it, without its photos' rows."""
    side = resolution // base.vae_factor
    latents = torch.empty(batch_size, base.unet.config.in_channels, side, side)
    return {"mean": latents, "std": latents, "prompts": [PROMPT] * batch_size}


def remember_made_up(base: Base, prompts: Iterable[str]) -> None:
    """Let a base know prompts, as if its text encoders had embedded them before they were released."""
    (known,) = list(base.remembered.values())[:1]
    for prompt in prompts:
        base.remembered[prompt] = known


def draw_of(module: PersonalizationModule, estimator: Estimator, batch: dict[str, Any]) -> Draw:
    """What a step of the branch of an estimator trains on, with a made-up activation where there is a hollow."""
    draw = module.draw_for(batch, estimator is module.estimator, step_generator(module.seed, 0))
    return draw if module.hollow is None else module.hollow.with_made_up(module, draw)


def gradient(module: PersonalizationModule, estimator: Estimator, draw: Draw) -> None:
    """What one training step computes and exchanges, but for the optimizer's part."""
    trained, ranks = module.adapter.numbered(), module.ranks
    if module.subspace is not None:
        module.subspace.rehearse(trained[0])
    if isinstance(estimator, Backprop):
        estimator.backward(lambda members: module.losses(members, draw), trained.values())
        ranks.average_gradients_(trained.values())
    elif isinstance(estimator, ZerothOrderEstimator):
        estimator.weigh(lambda members: module.losses(members, draw), 1, parameters=trained, ranks=ranks)
    elif estimator.moves_itself:  # a search's own arithmetic is on the host
        with torch.no_grad():
            shared_losses(module, draw, ranks, trained[0].expand(estimator.members, -1, -1))
    else:
        exchanged = ranks if estimator.forward_only else ALONE
        estimator.estimate(partial(shared_losses, module, draw, exchanged), next(iter(trained.values())))


def gradients_together(subjects: SubjectBatch, batch: list[dict[str, Any]]) -> None:
    """`gradient` of several subjects at once."""
    for one in subjects.each:
        if one.subspace is not None:
            one.subspace.rehearse(one.adapter.numbered()[0])
    estimator = subjects.first.estimator

    def losses(members: Members) -> Tensor:
        return subjects.losses([members] * len(subjects.each), batch)

    if isinstance(estimator, Backprop):
        estimator.backward(lambda here: losses(here).sum()[None], subjects.parameters())
    elif isinstance(estimator, ZerothOrderEstimator):
        with torch.no_grad():
            losses(estimator.asked(0))


def step(module: PersonalizationModule, estimator: Estimator, batch: dict[str, Any]) -> None:
    """`gradient` of a batch."""
    gradient(module, estimator, draw_of(module, estimator, batch))


@torch.no_grad()
def denoise(module: PersonalizationModule, side: int, pictures: int) -> None:
    """One denoising step of so many pictures, `side` latents wide, with guidance."""
    base = module.base
    assert base is not None
    told = module.condition_on([module.named(PROMPT)] * 2 * pictures)
    noise = torch.randn(2 * pictures, base.unet.config.in_channels, side, side, dtype=base.dtype, device=base.device)
    times = torch.zeros(2 * pictures, dtype=torch.int64, device=base.device)
    with module.drawing():
        base.unet(noise, times, encoder_hidden_states=told.embeds, added_cond_kwargs=told.added(noise))
