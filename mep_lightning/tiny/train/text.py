"""The tokenizer (a CLIP byte-pair vocabulary of the tiny world's words) and the text encoder's shape."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mep_lightning.run_folder import write_atomically
from mep_lightning.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from mep_lightning.tiny.captions import PLACES
from mep_lightning.tiny.names import NAMES
from mep_lightning.tiny.world import BADGES, CLASSES, COLORS, PATTERNS

MAX_TOKENS = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary_words() -> list[str]:
    lines = [*OBJECT_TEMPLATES, *STYLE_TEMPLATES, *CLASSES, *COLORS, *PATTERNS, *BADGES, "and with a the of photo"]
    lines += [phrase for phrases in PLACES.values() for phrase in phrases]
    return sorted({word for line in lines for word in re.findall("[a-z]+", line.lower())} | set(NAMES))


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token: always the commonest pair, ties by the alphabet.

    (The `tokenizers` trainer breaks ties at random, and training must be able to carry on with the same ids.)
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for pieces in spellings for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merged(pieces, best) for pieces in spellings]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(directory: Path) -> CLIPTokenizer:
    """A CLIP tokenizer to which every word of the world is one token, as vocab.json and merges.txt for any reader."""
    words = vocabulary_words()
    merges = learn_merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + [BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    # whole or not at all: two stages may start at once
    write_atomically(directory / "vocab.json", json.dumps(vocabulary))
    write_atomically(directory / "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"), model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(directory)
    split = [w for w in words if len(tokenizer(w).input_ids) != 3]
    assert not split, f"words of more than one token: {split}"
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, **changes: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))
