"""Made-up names: a word for a whole look, kept apart from the subjects."""

import random

import torch

from mep_lightning.tiny.captions import COLOR_NAMES, scene_caption
from mep_lightning.tiny.names import NAMES, looks, named_scenes
from mep_lightning.tiny.subjects import COUNTS, subjects
from mep_lightning.tiny.train.text import vocabulary_words
from mep_lightning.tiny.world import CLASSES, IDENTITY, PALETTE


def drawn(n=300, seed=0):
    return named_scenes(n, torch.Generator().manual_seed(seed))


def test_every_name_is_a_word_of_its_own():
    assert len(set(NAMES)) == len(NAMES) == len(looks())
    words = vocabulary_words()
    assert len(words) == len(set(words)) and set(NAMES) < set(words)
    others = set(words) - set(NAMES)
    assert {"red", "striped", "ball", "photo"} < others


def test_a_name_has_one_look_on_objects_of_every_class():
    scenes, named = drawn(3000)
    for field in set(IDENTITY) - {"kind", "paint"}:
        assert torch.equal(getattr(scenes, field), getattr(looks(), field)[named["name"]]), field
    plain = named["paint"] < 0
    assert torch.equal(scenes.paint[plain], looks().paint[named["name"]][plain])
    assert len(set(scenes.kind.tolist())) == len(CLASSES)
    one = scenes.background[named["name"] == named["name"][0]]
    assert len(set(one.tolist())) > 1


def test_some_are_repainted_and_the_caption_says_so():
    scenes, named = drawn()
    repainted = named["paint"] >= 0
    assert 0.2 < repainted.float().mean() < 0.4
    assert torch.equal(scenes.paint[repainted], PALETTE[named["paint"][repainted]])
    for i in range(len(scenes)):
        words = scene_caption(scenes, named, i, random.Random(i), keep=1.0).split()
        color = [COLOR_NAMES[named["paint"][i]]] if repainted[i] else []
        assert words[1 : 3 + len(color)] == [*color, NAMES[named["name"][i]], CLASSES[scenes.kind[i]]]


def test_captions_of_named_looks_may_leave_the_place_out_but_never_the_name():
    scenes, named = drawn(1)
    said = {scene_caption(scenes, named, 0, random.Random(i)) for i in range(60)}
    assert len(said) > 10 and all(NAMES[named["name"][0]] in caption.split() for caption in said)


def test_no_subject_has_a_name():
    paints = {tuple(paint) for paint in looks().paint.tolist()}
    assert len(paints) == len(NAMES)
    assert not paints & {tuple(s.scenes.paint[0].tolist()) for split in COUNTS for s in subjects(split)}
