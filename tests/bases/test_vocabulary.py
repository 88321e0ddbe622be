"""CLIP's vocabulary for single files: beside the file, in the hub's cache, or one sentence."""

import shutil

import pytest

from mep_lightning.bases import load_base, open_base
from mep_lightning.bases.families import TINY_FOLDER
from mep_lightning.bases.single_file import open_file
from mep_lightning.bases.vocabulary import FILES, PUBLISHED, find_vocabulary, tokenizer_for
from mep_lightning.errors import UserError


@pytest.fixture
def alone(single_files, tmp_path, monkeypatch):
    """A file beside which there is nothing, and a hub out of reach whose cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return shutil.copy(single_files / "sdxl.safetensors", tmp_path)


def cached(root, repository, folder):
    """CLIP's two files as an earlier download has left them."""
    kept = root / f"models--{repository.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    where = kept / "snapshots" / ("a" * 40) / folder
    where.mkdir(parents=True)
    for name in FILES:
        shutil.copy(TINY_FOLDER / "tokenizer" / name, where)
    return where


@pytest.mark.parametrize(("repository", "folder"), PUBLISHED)
def test_it_is_taken_from_where_diffusers_has_left_it(alone, tmp_path, repository, folder):
    where = cached(tmp_path / "hub", repository, folder)
    assert find_vocabulary(open_file(alone)) == where


def test_two_files_make_the_tokenizer(alone, tmp_path, tiny_base):
    where = cached(tmp_path / "hub", *PUBLISHED[0])
    own = tiny_base.tokenizers[0]
    for part, pad in (("text_encoder", own.eos_token), ("text_encoder_2", "!")):
        made = tokenizer_for(open_file(alone), where, part, 32)
        assert (made.pad_token, made.model_max_length, len(made)) == (pad, 32, len(own))
        text = "a photo of a red ball, on GRASS!"
        assert made(text).input_ids == own(text).input_ids


def test_without_one_nothing_is_loaded(alone, tmp_path):
    for load in (open_base, load_base):
        with pytest.raises(UserError, match=r"sdxl.safetensors holds no tokenizer, .* put vocab.json and merges.txt"):
            load(alone)
    assert open_base(alone, weights=False).family == "sdxl"  # planning needs none
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match="tokenizer holds no CLIP tokenizer: vocab.json and merges.txt are needed"):
        load_base(alone)
