"""SubjectData: a folder of photos -> prompts and cached latents, drawn as a pure function of (seed, step)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from mep_lightning.errors import UserError, counted
from mep_lightning.photos import Crop, Photo, find_photos, square
from mep_lightning.templates import IN_THE_STYLE_OF, caption_to_template, choose_templates

PREVIEW = 1024  # longest side of `photos`, px


class Batch(TypedDict):
    """One step's draw. B batch, C latent channels, h w latent pixels."""

    mean: Tensor  # [B, C, h, w] fp32, unscaled, at the highest resolution
    std: Tensor  # [B, C, h, w] fp32, unscaled
    prompts: list[str]  # B templates with "{}" where the subject's phrase goes
    rows: list[int]  # B rows of `SubjectData.latents`, for the same views at another resolution
    priors: int  # how many of them, the last ones, are of the class and not of the subject
    step: int


class SubjectData(LightningDataModule):
    """Photos of one subject (or style), with their prompts, as latents of the base model's VAE.

    Batches come from `train_dataloader` once `encode` has run; `PersonalizationModule` calls it in its own `setup`.
    Sample n (n = step * batch_size + place in the batch) takes photo pi_k[n mod N], k = n div N, where pi_k is a
    permutation of the N photos made from (seed, k): each run of N samples sees every photo once. Flip and template come
    from (seed, n). Nothing else is remembered, so a resumed run goes on from `trainer.global_step` as if never stopped.
    Every rank of a distributed run draws the same batch.

    Args:
        path: a folder of JPEG, PNG or WebP photos, or one photo; None takes the sample photos of the base `tiny`.
            Captions may lie beside them (NAME.txt, or metadata.jsonl with "file_name" and "text") and then take the
            place of the templates; see `caption_to_template` for where the subject's phrase goes.
        class_word: what the photos show, in a word, such as dog; may be left out with the sample photos and of a style.
        batch_size: samples a step.
        resolution: side of the square the model sees in px, a multiple of 8; auto is the base model's own.
        crop: center takes the middle square of each photo, letterbox keeps all of it between white bars.
        templates: object, style, or a list of prompts, each with {} where the subject goes. With style the photos share
            a way to look, whatever they show; prompts then hold the token alone (or with the class word, if there is
            one, as in "in the style of <sks> watercolor").
        flip: let half of the samples be mirrored.
        repeats: how often an epoch shows each photo; None makes an epoch that never ends, for `Trainer(max_steps=…)`.
        seed: of the order of photos, flips and templates; None takes `default_seed`, which a module sets to its own.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        class_word: str | None = None,
        batch_size: int = 1,
        resolution: int | Literal["auto"] = "auto",
        crop: Crop = "center",
        templates: Literal["object", "style"] | list[str] = "object",
        flip: bool = False,
        repeats: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if crop not in ("center", "letterbox"):
            raise UserError(f'data.crop is "{crop}": use center or letterbox')
        for key, number in (("batch_size", batch_size), ("repeats", 1 if repeats is None else repeats)):
            if number < 1:
                raise UserError(f"data.{key} is {number}: use 1 or more")
        if resolution != "auto":
            check_resolution(resolution)
        self.path = None if path is None else Path(path).expanduser()
        self.batch_size = batch_size
        self.resolution: int | Literal["auto"] = resolution
        self.crop: Crop = crop
        self.templates = choose_templates(templates)
        self.is_style = templates == "style"
        self.flip = flip
        self.repeats = repeats
        self.seed = seed
        self.default_seed = 0
        self.token: str | None = None
        """The subject's token, where captions hold one without angle brackets ("a sks dog")."""
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}
        """resolution -> (mean, std), each [N, C, h, w]; with flip [2N, C, h, w], the mirrored views last.

        fp32 on the CPU and UNSCALED: the posterior as the VAE gives it; `sample_latents` applies the base's
        `scaling_factor`.
        """
        self._class_word = (class_word or "").strip() or None
        self._photos: list[Photo] = []
        self._priors: range | None = None
        self._prior_prompt = ""

    def setup(self, stage: str | None = None) -> None:
        """Find the photos and decode each once, so that a damaged one is named before a model is loaded."""
        if self._photos or stage == "predict":  # predicting needs no photos
            return
        if self.path is None and self.is_style:
            from mep_lightning.tiny import sample_style

            photos = [Photo(name, image, caption) for name, image, caption in sample_style()]
        elif self.path is None:
            from mep_lightning.tiny import sample_photos

            samples, class_word = sample_photos()
            photos = [Photo(name, image) for name, image in samples]
            self._class_word = self._class_word or class_word
        else:
            if self._class_word is None and not self.is_style:
                raise UserError("data.class_word is missing: say in a word what the photos show, such as dog")
            photos = find_photos(self.path)
            for photo in photos:
                photo.read(at_least=64)
        self._photos = photos

    @property
    def class_word(self) -> str | None:
        """What the photos show; None of a style, which is what they share."""
        if self._class_word is None and not self.is_style:
            self.setup()
        return self._class_word

    @property
    def has_priors(self) -> bool:
        """Whether pictures of the class go with the photos."""
        return self._priors is not None

    @property
    def names(self) -> list[str]:
        """File names in the order of the latents' rows."""
        self.setup()
        return [photo.name for photo in self._photos]

    @property
    def photos(self) -> list[Image.Image]:
        """The whole photos, upright RGB, read anew each time; the longest side is at most 1024 px."""
        self.setup()
        images = [photo.read(at_least=PREVIEW) for photo in self._photos]
        for image in images:
            image.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        return images

    @property
    def texts(self) -> list[str]:
        """Every prompt that a batch may hold, with "{}" where the subject's phrase goes."""
        self.setup()
        captions = [photo.caption for photo in self._photos if photo.caption is not None]
        own = [self._template(caption) for caption in captions]
        return list(dict.fromkeys(own + ([] if len(own) == len(self._photos) else list(self.templates))))

    def _template(self, caption: str) -> str:
        return caption_to_template(caption, self.class_word, self.token, self.is_style)

    def thumbnails(self, size: int) -> list[Image.Image]:
        """The photos as the model sees them, size x size px."""
        self.setup()
        return [square(photo.read(at_least=2 * size), size, self.crop) for photo in self._photos]

    def summary(self) -> str:
        """One line for people: how many photos of what, and how they are used."""
        self.setup()
        captions = sum(photo.caption is not None for photo in self._photos)
        size = max(self.latents, default=self.resolution)
        parts = [
            f"{self.crop} crop" if self.crop == "center" else self.crop,
            "the base's resolution" if size == "auto" else f"{size} px",
            *([counted(captions, "caption")] if captions else []),
            *([counted(len(self.templates), "template")] if captions < len(self._photos) else []),
            *(["half mirrored"] if self.flip else []),
        ]
        source = "the sample photos" if self.path is None else self.path
        shown = "in a style" if self.class_word is None else f"of {self.class_word}"
        if self.is_style and self.class_word is not None:
            shown = f"{IN_THE_STYLE_OF} {self.class_word}"
        return f"{counted(len(self._photos), 'photo')} {shown} from {source} ({', '.join(parts)})"

    @torch.no_grad()
    def encode(self, base: Any, resolutions: Sequence[int] | None = None) -> None:
        """Encode every photo at every resolution, one picture at a time, into `latents`, replacing what was there.

        Args:
            base: what `open_base` or `load_base` returns; needed are `.vae` (an AutoencoderKL; where there is none,
                `.borrowed_vae("encoder")` is used), `.resolution` and `.vae_factor`.
            resolutions: sides in px; batches take the highest. Default: the `resolution` this was made with.

        Raises:
            UserError: a resolution the VAE cannot encode, a photo that cannot be read, or latents that are not finite.
        """
        self.setup()
        if self.path is None and getattr(base, "family", "tiny") != "tiny":
            raise UserError("data.path is missing: give it a folder of photos (only the base tiny brings its own)")
        if resolutions is None:
            resolutions = [base.resolution if self.resolution == "auto" else self.resolution]
        for resolution in resolutions:
            check_resolution(resolution, base.vae_factor)

        self.latents, self._priors = self._encoded(base, self._photos, resolutions), None

    def add_prior(self, base: Any, photos: Sequence[Photo], prompt: str) -> None:
        """Put a picture of the class beside every photo of a batch (prior preservation, DreamBooth).

        Args:
            base: as for `encode`, which has run.
            photos: of the class, without the subject.
            prompt: what they show.
        """
        first = len(next(iter(self.latents.values()))[0])
        added = self._encoded(base, photos, list(self.latents))
        for resolution, (mean, std) in added.items():
            old_mean, old_std = self.latents[resolution]
            self.latents[resolution] = torch.cat([old_mean, mean]), torch.cat([old_std, std])
        self._priors = range(first, first + len(next(iter(added.values()))[0]))
        self._prior_prompt = prompt

    def _encoded(
        self, base: Any, photos: Sequence[Photo], resolutions: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean and std of photos at every resolution, mirrored views last."""
        small = []
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {resolution: [] for resolution in resolutions}
        kept = getattr(base, "vae", None)
        with base.borrowed_vae("encoder") if kept is None else nullcontext(kept) as vae:
            for photo in photos:
                image = photo.read(at_least=2 * max(resolutions))
                if (min if self.crop == "center" else max)(image.size) < max(resolutions):
                    small.append(photo.name)
                for resolution in parts:
                    pixels = to_pixels(square(image, resolution, self.crop))
                    views = [pixels, pixels.flip(-1)] if self.flip else [pixels]
                    means, stds = zip(
                        *(encode_image(vae, view, photo.name, getattr(base, "device", None)) for view in views),
                        strict=True,
                    )
                    parts[resolution].append((torch.stack(means), torch.stack(stds)))  # [views, C, h, w]
        if small:
            rest = f" and {len(small) - 1} more" if len(small) > 1 else ""
            rank_zero_warn(
                f"{small[0]}{rest}: smaller than {max(resolutions)} px, so enlarged and softer than the model can draw"
            )
        columns = {resolution: zip(*moments, strict=True) for resolution, moments in parts.items()}
        return {
            resolution: (_plain_then_mirrored(means), _plain_then_mirrored(stds))
            for resolution, (means, stds) in columns.items()
        }

    def at(self, resolution: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and std [B, C, h, w] of the given rows (`batch["rows"]`) at one of the encoded resolutions, in fp32."""
        mean, std = self.latents[resolution]
        rows = list(rows)
        return mean[rows], std[rows]

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (seed, step), the photos and the arguments."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        drawn = [self._draw(n) for n in samples]
        priors = [] if self._priors is None else [self._draw_prior(n, self._priors) for n in samples]
        rows, prompts = (list(column) for column in zip(*drawn, *priors, strict=True))
        mean, std = self.at(max(self.latents), rows)
        return {"mean": mean, "std": std, "prompts": prompts, "rows": rows, "priors": len(priors), "step": step}

    def _draw_prior(self, n: int, priors: range) -> tuple[int, str]:
        """Row and prompt of the picture of the class beside sample n."""
        seed = self.default_seed if self.seed is None else self.seed
        return priors[int(random.Random(f"mep prior {seed} {n}").random() * len(priors))], self._prior_prompt

    def _draw(self, n: int) -> tuple[int, str]:
        """Row and template of sample n. Python's generator is seeded through SHA-512: same draws on every machine."""
        size = len(self._photos)
        seed = self.default_seed if self.seed is None else self.seed
        order = random.Random(f"mep order {seed} {n // size}")
        index = sorted(range(size), key=lambda _: order.random())[n % size]
        rng = random.Random(f"mep sample {seed} {n}")
        mirrored = rng.random() < 0.5 and self.flip
        template = self.templates[int(rng.random() * len(self.templates))]
        caption = self._photos[index].caption
        if caption is not None:
            template = self._template(caption)
        return index + size * mirrored, template

    def train_dataloader(self) -> Batches:
        """Batches from the step the trainer is at.

        Raises:
            UserError: nothing is encoded yet, or the trainer waits for the end of an epoch that has none.
        """
        if not self.latents:
            raise UserError("SubjectData has no latents yet: call data.encode(base) in your module's setup")
        trainer = self.trainer
        if trainer is not None and self.repeats is None and isinstance(trainer.limit_train_batches, float):
            if trainer.max_steps == -1 and trainer.max_epochs not in (None, -1):
                raise UserError(
                    "An epoch of SubjectData never ends: give the Trainer max_steps, or data.repeats a number"
                )
            if trainer.early_stopping_callbacks and not trainer.enable_validation:
                rank_zero_warn(
                    "EarlyStopping waits for the end of an epoch, and one of SubjectData never ends: "
                    "give data.repeats a number"
                )
        return Batches(self)


class Batches:
    """What `train_dataloader` returns: `batch(step)` for step = trainer.global_step, +1, …

    A DataLoader would have Lightning advise more workers, which could only slow down what lies in memory already.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        start = self.data.trainer.global_step if self.data.trainer is not None else 0
        steps = count(start) if self.data.repeats is None else range(start, start + len(self))
        for step in steps:
            yield self.data.batch(step)

    def __len__(self) -> int:
        if self.data.repeats is None:
            raise TypeError("endless: SubjectData was made without repeats")  # Lightning reads this as "no length"
        return math.ceil(self.data.repeats * len(self.data.names) / self.data.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the step is all the state, and the trainer keeps it. Having it tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def check_resolution(resolution: int, vae_factor: int = 8) -> None:
    """Raise UserError unless the side is a multiple of 8 px and of the pixels a latent stands for."""
    multiple = math.lcm(8, vae_factor)
    if resolution < multiple or resolution % multiple:
        below = max(resolution // multiple, 1) * multiple
        mend = f"{below} or {below + multiple}" if resolution > multiple else f"{multiple} or more"
        raise UserError(f"resolution {resolution} is not a multiple of {multiple}: use {mend}")


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as the VAE wants it: [3, H, W] fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def encode_image(
    vae: Any, pixels: Tensor, name: str = "the picture", device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and std [C, h, w] of the VAE's posterior for pixels [3, H, W]: fp32, on the CPU, unscaled.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1].
        name: what a message calls the picture.
        device: where it computes, if that is not where its weights are.
    """
    posterior = vae.encode(pixels[None].to(device or vae.device, vae.dtype)).latent_dist
    mean, std = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise UserError(f"The VAE gives values that are not finite for {name} in {vae.dtype}: load the base in fp32")
    return mean, std


def sample_latents(mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw the latents that the U-Net works on: scaling_factor * (mean + std * noise). The one place that scales.

    Args:
        mean, std: [B, C, h, w] as `SubjectData` stores them.
        noise: [B, C, h, w] standard normal.
        scaling_factor: the base's, `vae.config.scaling_factor`; 0.18215 for SD1.5.
    """
    return (mean + std * noise) * scaling_factor


def _plain_then_mirrored(views: Sequence[Tensor]) -> Tensor:
    """[views, C, h, w] of each photo -> rows [views * N, C, h, w]."""
    return torch.stack(tuple(views), dim=1).flatten(0, 1)
