"""Tokenizers: a folder's own, and CLIP's vocabulary for single files, which hold none."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from mep_lightning.bases.single_file import SingleFile
from mep_lightning.errors import UserError

PUBLISHED = (
    ("openai/clip-vit-large-patch14", "."),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
)
"""Hub ids, and the folders in them, that hold the vocabulary which SD1, SD2 and SDXL share."""
FILES = ("vocab.json", "merges.txt")
OPEN_CLIP_PAD = "!"
"""Token 0, with which open_clip fills up; CLIP takes its end of text."""


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a part's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):  # transformers would make it up
        raise UserError(f"{folder} holds no CLIP tokenizer: vocab.json and merges.txt are needed")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder} holds a tokenizer that cannot be read: fetch the base again") from error


def tokenizer_for(file: SingleFile, folder: Path, part: str, length: int) -> CLIPTokenizer:
    """The tokenizer that a text encoder of a single file was trained with.

    Args:
        file: the base.
        folder: of CLIP's vocabulary, such as `find_vocabulary` finds.
        part: the text encoder.
        length: how many tokens it reads.
    """
    made = load_tokenizer(folder)
    made.model_max_length = length
    made.pad_token = OPEN_CLIP_PAD if file.is_open_clip(part) else made.eos_token
    return made


def find_vocabulary(file: SingleFile) -> Path:
    """Where CLIP's vocabulary is: a folder `tokenizer` beside a single file, or the hub's cache (fetched at need).

    Raises:
        UserError: it is nowhere, and the hub is out of reach.
    """
    beside = file.path.parent / "tokenizer"
    if beside.is_dir():
        return beside
    for repository, folder in PUBLISHED:
        if found := _on_hub(repository, folder, only_cached=True):
            return found
    if found := _on_hub(*PUBLISHED[0], only_cached=False):
        return found
    raise UserError(
        f"{file.path} holds no tokenizer, and CLIP's is not to be had from the hub: put vocab.json and merges.txt of "
        f"{PUBLISHED[0][0]} into {beside}, or let the network be reached once"
    )


def _on_hub(repository: str, folder: str, *, only_cached: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/{name}".removeprefix("./") for name in FILES]
    try:
        root = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=only_cached)) / folder
    except Exception:  # the hub's client raises many kinds, all meaning: not to be had
        return None
    return root if all((root / name).is_file() for name in FILES) else None
