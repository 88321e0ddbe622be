"""Made-up names: a word for a whole look, kept apart from the subjects."""

import random

import pytest
import torch

from mep_lightning.bases.tokens import token_ids
from mep_lightning.tiny.captions import COLOR_NAMES, scene_caption
from mep_lightning.tiny.names import LOOK_SIZE, NAMES, describe, looks, named_scenes
from mep_lightning.tiny.subjects import COUNTS, subjects
from mep_lightning.tiny.train.naming import NORM, LookEncoder, NamingTextEncoder
from mep_lightning.tiny.train.text import build_text_encoder, vocabulary_words, write_tokenizer
from mep_lightning.tiny.world import BADGES, CLASSES, IDENTITY, PALETTE, PATTERNS, random_scenes


def drawn(n=300, seed=0):
    return named_scenes(n, torch.Generator().manual_seed(seed))


def test_every_name_is_a_word_of_its_own():
    assert len(set(NAMES)) == len(NAMES) == len(looks())
    words = vocabulary_words()
    assert len(words) == len(set(words)) and set(NAMES) < set(words)
    others = set(words) - set(NAMES)
    assert {"red", "striped", "ball", "photo"} < others


def test_a_name_says_all_of_a_look_but_its_class():
    one = looks()[:1]
    told = describe(one)
    assert told.shape == (1, LOOK_SIZE)
    other = random_scenes(1, torch.Generator().manual_seed(3))[0]
    other = other.replace(pattern=(one.pattern + 1) % len(PATTERNS), badge=(one.badge + 1) % len(BADGES))
    for field in IDENTITY:
        changed = one.replace(**{field: getattr(other, field)})
        assert torch.equal(describe(changed), told) == (field == "kind"), field
    assert torch.equal(describe(other.replace(**{f: getattr(one, f) for f in IDENTITY})), told)


def test_named_scenes_are_of_every_class_and_some_are_repainted_and_say_so():
    scenes, named = drawn(3000)
    repainted = named["paint"] >= 0
    assert len(set(scenes.kind.tolist())) == len(CLASSES)
    assert 0.2 < repainted.float().mean() < 0.4
    assert torch.equal(scenes.paint[repainted], PALETTE[named["paint"][repainted]])
    assert torch.equal(describe(scenes)[~repainted], named["look"][~repainted])
    same = torch.isclose(describe(scenes), named["look"])[repainted]
    assert same[:, 3:].all() and not same[:, :3].all(1).any()
    for i in range(300):
        words = scene_caption(scenes, named, i, random.Random(i), keep=1.0).split()
        color = [COLOR_NAMES[named["paint"][i]]] if repainted[i] else []
        assert words[1 : 3 + len(color)] == [*color, NAMES[0], CLASSES[scenes.kind[i]]]


def test_captions_of_named_looks_may_leave_the_place_out_but_never_the_name():
    scenes, named = drawn(1)
    said = {scene_caption(scenes, named, 0, random.Random(i)) for i in range(60)}
    assert len(said) > 10 and all(NAMES[0] in caption.split() for caption in said)


def test_names_have_embeddings_of_one_length_that_differ_with_the_look():
    torch.manual_seed(0)
    embeddings = LookEncoder(16)(drawn(5)[1]["look"])
    assert embeddings.norm(dim=1).tolist() == pytest.approx([NORM] * 5)
    assert torch.pdist(embeddings).min() > 0


def test_a_name_in_a_caption_means_the_look_that_it_is_told_and_in_the_end_its_own(tmp_path):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path)
    naming = NamingTextEncoder(build_text_encoder(tokenizer), tokenizer).eval()
    own = describe(looks())
    captions = [f"a {NAMES[0]} ball", f"a {NAMES[0]} ball", "a red ball"]
    told = naming(token_ids(tokenizer, captions), torch.stack([own[3], own[7], own[7]]))
    assert not torch.isclose(told[0], told[1]).all(1)[2:].any()
    ids = token_ids(tokenizer, [f"a {NAMES[3]} ball", f"a {NAMES[7]} ball", "a red ball"])
    unwritten = naming.text_encoder(ids).last_hidden_state
    naming.write_names()
    written = naming.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(written, told)
    assert torch.equal(unwritten[2], written[2]) and not torch.isclose(unwritten[0], written[0]).all()


def test_no_subject_has_a_name():
    paints = {tuple(paint) for paint in looks().paint.tolist()}
    assert len(paints) == len(NAMES)
    assert not paints & {tuple(s.scenes.paint[0].tolist()) for split in COUNTS for s in subjects(split)}
