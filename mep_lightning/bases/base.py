"""A loaded, frozen base model and its parts; no nn.Module, as Lightning must not move, cast or checkpoint it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTokenizer

from mep_lightning.bases.conversion import converted, names
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.bases.families import TEXT_ENCODERS, TOKENIZERS, Family
from mep_lightning.bases.single_file import SingleFile
from mep_lightning.bases.streaming import Stream, map_to_disk
from mep_lightning.bases.tokens import with_tokens
from mep_lightning.bases.vocabulary import find_vocabulary, load_tokenizer, tokenizer_for
from mep_lightning.bases.weights import (
    HALVES,
    Half,
    Tensors,
    build_vae,
    described,
    memory_format,
    refuse_incomplete,
    stored,
    stored_shapes,
    vae_dtype,
)


@dataclass(eq=False, kw_only=True)
class BaseFolder:
    """A base that is known and not loaded: what its folder says, and where and in which precision it is wanted.

    Attributes:
        name: as the user gave it ("tiny", a folder, a hub id, a single file).
        folder: where its files lie; of a single file, those that describe its architecture.
        info: family, native resolution, prediction type.
        precision: "fp32", "bf16", "fp16", "int8" or "int4" (what the weights are kept in).
        dtype: what activations are computed in.
        device: where it computes.
        offload: where the weights are: "none" on the device; "stream" in host memory, from where they visit a GPU layer
            by layer, or on a CPU in a file that is mapped into memory.
        file: the single file that holds its weights, where one does.
    """

    name: str
    folder: Path
    info: Family
    precision: str
    dtype: torch.dtype
    device: torch.device
    offload: str = "none"
    file: SingleFile | None = None

    @property
    def weights_device(self) -> torch.device:
        """Where the weights are between uses."""
        return torch.device("cpu") if self.offload == "stream" else self.device

    @property
    def memory_format(self) -> torch.memory_format:
        """Of convolutions' weights, which activations follow."""
        return memory_format(self.device, self.dtype)

    @property
    def address(self) -> str:
        """Where it is found again from anywhere on this machine: its name, or a local one's absolute path."""
        if self.file is not None:  # what lies beside it belongs to it, so a link is not followed
            return str(self.file.path.absolute())
        is_local = self.name != "tiny" and Path(self.name).expanduser().is_dir()
        return str(self.folder.resolve()) if is_local else self.name

    @property
    def family(self) -> str:
        return self.info.family

    @property
    def resolution(self) -> int:
        return self.info.resolution

    @property
    def vae_factor(self) -> int:
        return self.info.vae_factor

    def tensors(self, module: nn.Module, part: str) -> Tensors:
        """The stored weights of a module that was built from a part of `folder`, one at a time."""
        return stored(self.folder / part, module) if self.file is None else converted(self.file, module, part)

    def source(self, part: str) -> Path:
        """What holds a part's weights, for messages."""
        return self.folder / part if self.file is None else self.file.path

    @property
    def schedule(self) -> Mapping[str, Any]:
        """Settings of the noise schedule that are not those in `folder`."""
        return {} if self.file is None else self.file.schedule

    def read_tokenizer(self, part: str, length: int) -> CLIPTokenizer:
        """A tokenizer, named as in `folder`, for a text encoder that reads so many tokens."""
        if self.file is None:
            return load_tokenizer(self.folder / part)
        encoder = TEXT_ENCODERS[TOKENIZERS.index(part)]
        return tokenizer_for(self.file, find_vocabulary(self.file), encoder, length)

    def read_vae(self, half: Half | None = None) -> AutoencoderKL:
        """The autoencoder, read from disk, where weights wait; all of it, or the half that encodes or decodes."""
        dtype, tensors = vae_dtype(self.folder, self.dtype), partial(self.tensors, part="vae")
        vae = build_vae(self.folder / "vae", tensors, self.source("vae"), self.weights_device, dtype, half)
        if half == "encoder":  # pictures would miss the decoder after hours of training
            whole = described(AutoencoderKL, self.folder / "vae")
            refuse_incomplete(whole, self.shapes(whole, "vae"), self.source("vae"))
        return vae

    def shapes(self, module: nn.Module, part: str) -> Mapping[str, Sequence[int]]:
        """As `tensors`, of which nothing is read but names and shapes."""
        if self.file is None:
            return stored_shapes(self.folder / part)
        return {name: stand_in.shape for name, stand_in in names(self.file, module, part).items()}

    @contextmanager
    def borrowed_vae(self, half: Half | None = None) -> Iterator[AutoencoderKL]:
        """The autoencoder, or half of it, for the length of a `with`, read from disk.

        `SubjectData.encode` needs no more of a base than the encoder.
        """
        vae = self.read_vae(half)
        stream = self.placed(vae)
        try:
            yield vae
        finally:
            if stream is not None:
                stream.close()

    def placed(self, module: nn.Module) -> Stream | None:
        """Bring a loaded part to where its weights wait, where that is not the device; its stream, where it has one."""
        if self.offload == "stream" and self.device.type != "cpu":
            return Stream(module, self.device)
        if self.offload == "stream":
            map_to_disk(module)
        return None


@dataclass(eq=False, kw_only=True)
class Base(BaseFolder):
    """The frozen model that an adapter personalises; beside what `BaseFolder` holds:

    Attributes:
        unet: the U-Net.
        text_encoders: one for SD1 and SD2, two for SDXL; none while they are released.
        read_text_encoders: reads them again, with the streams of those that are streamed.
        read_unet: reads the weights of some of the U-Net's modules again.
        freed: those of its modules that hold no weights now.
        guest: the adapter that stands in the U-Net's layers.
        tokenizers: one a text encoder.
        vae: the autoencoder, None where it was not loaded or is released.
        scheduler: the training noise schedule.
        scaling_factor: what scales the autoencoder's latents to unit variance.
        streams: of the parts that are streamed to a GPU.
        text_streams: of the text encoders among them.
        remembered: prompts without trained tokens that were embedded already, each with its `Conditioning`.
        graphs: captured over these weights and this device's memory.
    """

    unet: UNet2DConditionModel
    text_encoders: list[nn.Module]
    read_text_encoders: Callable[[], tuple[list[nn.Module], list[Stream]]]
    read_unet: Callable[[Sequence[nn.Module]], None]
    tokenizers: list[Any]
    vae: AutoencoderKL | None
    scheduler: DDPMScheduler
    scaling_factor: float
    streams: list[Stream] = field(default_factory=list)
    text_streams: list[Stream] = field(default_factory=list)
    freed: list[nn.Module] = field(default_factory=list, repr=False)
    guest: Any = field(default=None, repr=False)
    remembered: dict[str, Any] = field(default_factory=dict, repr=False)
    graphs: list[CUDAGraphed] = field(default_factory=list, repr=False)
    _enlarged: dict[tuple[int, tuple[tuple[str, int], ...]], Any] = field(default_factory=dict, repr=False)

    def modules(self) -> list[nn.Module]:
        """All parts that hold weights now."""
        return [m for m in (self.unet, *self.text_encoders, self.vae) if m is not None]

    @property
    def text_widths(self) -> list[int]:
        """Dimensions of each text encoder's token embeddings."""
        return [encoder.get_input_embeddings().embedding_dim for encoder in self.text_encoders]  # type: ignore[operator]

    def tokenizer_with(self, counts: Mapping[str, int], index: int = 0) -> Any:
        """A tokenizer that also knows new tokens, `counts` vectors each; kept, as copying a vocabulary takes long."""
        if not counts:
            return self.tokenizers[index]
        key = index, tuple(counts.items())
        if key not in self._enlarged:
            self._enlarged[key] = with_tokens(self.tokenizers[index], counts)
        return self._enlarged[key]

    def close(self) -> None:
        """Give back what streaming holds on the device; the base is of no use afterwards."""
        self.forget_graphs()
        for stream in (*self.streams, *self.text_streams):
            stream.close()

    def forget_graphs(self) -> None:
        """Give back what captured graphs hold; they are captured anew when they are next needed."""
        for graph in self.graphs:
            graph.clear()

    def free(self, modules: Sequence[nn.Module]) -> None:
        """Let parts of the U-Net leave memory; `whole` reads them again."""
        self.freed = [*self.freed, *modules]
        for module in modules:
            module.to("meta")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All of the U-Net for the length of a `with`: what was freed is read from disk, and freed again."""
        freed, self.freed = self.freed, []
        if freed:
            self.read_unet(freed)
        try:
            yield
        finally:
            if freed:
                self.free(freed)

    def release_text_encoders(self) -> None:
        """Free the text encoders: what is remembered stays, and `borrowed_text_encoders` reads them again."""
        for stream in self.text_streams:
            stream.close()
        self.text_encoders, self.text_streams = [], []

    @contextmanager
    def borrowed_text_encoders(self) -> Iterator[None]:
        """The text encoders for the length of a `with`; read from disk again, and freed, where there are none."""
        if self.text_encoders:
            yield
            return
        self.text_encoders, self.text_streams = self.read_text_encoders()
        try:
            yield
        finally:
            self.release_text_encoders()

    def release_vae(self) -> None:
        """Free the autoencoder: after the photos are encoded, training never needs it."""
        self.vae = None

    @contextmanager
    def borrowed_vae(self, half: Half | None = None) -> Iterator[AutoencoderKL]:
        """As of a `BaseFolder`; where the base has one that is lent, and nothing is read or freed."""
        if self.vae is not None and all(getattr(self.vae, one) is not None for one in ([half] if half else HALVES)):
            yield self.vae
            return
        before = self.vae
        with super().borrowed_vae(half) as self.vae:
            try:
                yield self.vae
            finally:
                self.vae = before

    @contextmanager
    def parked(self) -> Iterator[None]:
        """U-Net and text encoders in host memory for the length of a `with`, where the device has memory of its own."""
        self.forget_graphs()  # they would replay on memory that is another's by then
        movable = self.device.type == "cuda" and self.offload == "none"
        parts = [self.unet, *self.text_encoders] if movable else []
        try:
            for part in parts:
                _move(part, "cpu")
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what a failed body holds would be in the way
            raise
        finally:
            for part in parts:
                _move(part, self.device)

    def pipeline(self, vae: AutoencoderKL | None) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """A diffusers pipeline over these very parts (no copies); without a VAE it gives latents."""
        self.forget_graphs()
        parts = {"vae": vae, "unet": self.unet, "scheduler": self.scheduler}
        encoders: list[Any] = self.text_encoders or [None] * len(
            self.tokenizers
        )  # without them it takes embeddings alone
        texts = {"text_encoder": encoders[0], "tokenizer": self.tokenizers[0]}
        pipe: _Pipeline | _XLPipeline
        if len(encoders) > 1:
            second = {"text_encoder_2": encoders[1], "tokenizer_2": self.tokenizers[1]}
            zeros = {"force_zeros_for_empty_prompt": self.info.force_zeros}
            pipe = _XLPipeline(**parts, **texts, **second, **zeros, add_watermarker=False)
        else:
            unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipe = _Pipeline(**parts, **texts, **unused)
        pipe.home = self.device
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _move(module: nn.Module, device: torch.device | str) -> None:
    """Move what a module holds; what is freed of it stays so."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


class _AtHome:
    """A pipeline that computes on `home`, wherever its weights wait."""

    home: torch.device

    @property
    def _execution_device(self) -> torch.device:
        return self.home


class _Pipeline(_AtHome, StableDiffusionPipeline):
    pass


class _XLPipeline(_AtHome, StableDiffusionXLPipeline):
    pass
