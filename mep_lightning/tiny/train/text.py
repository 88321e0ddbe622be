"""The tokenizer (a CLIP byte-pair vocabulary of the tiny world's words) and the text encoder's shape."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mep_lightning.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from mep_lightning.tiny.captions import PLACES
from mep_lightning.tiny.world import BADGES, CLASSES, COLORS, PATTERNS

MAX_TOKENS = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary_words() -> list[str]:
    lines = [*OBJECT_TEMPLATES, *STYLE_TEMPLATES, *CLASSES, *COLORS, *PATTERNS, *BADGES, "and with a the of photo"]
    lines += [phrase for phrases in PLACES.values() for phrase in phrases]
    return sorted({word for line in lines for word in re.findall("[a-z]+", line.lower())})


def write_tokenizer(directory: Path) -> CLIPTokenizer:
    """Learn merges until every word of the world is one token; write vocab.json and merges.txt for any reader."""
    words = vocabulary_words()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    learner.train_from_iterator([" ".join(words)], trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + [BOS, EOS]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
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
