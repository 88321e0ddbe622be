"""The tiny world: what is drawn is what the parameters say."""

import random

import pytest
import torch

from mep_lightning.tiny.captions import COLOR_NAMES, evaluation_prompts, scene_caption
from mep_lightning.tiny.subjects import COUNTS, subject, subjects
from mep_lightning.tiny.world import BACKGROUNDS, BADGES, CLASSES, IDENTITY, PATTERNS, SIZE, random_scenes, render


def scenes(n, seed=0):
    return random_scenes(n, torch.Generator().manual_seed(seed))


def test_rendering_is_a_pure_function_of_the_scene():
    some, _ = scenes(16)
    alone = torch.cat([render(some[i : i + 1]) for i in range(16)])
    assert torch.equal(render(some), alone)
    assert alone.shape == (16, 3, SIZE, SIZE) and alone.min() >= 0 and alone.max() <= 1


@pytest.mark.parametrize("kind", range(len(CLASSES)), ids=CLASSES)
def test_a_plain_object_shows_its_paint(kind):
    some, _ = scenes(1, seed=kind)
    one = some.replace(
        kind=torch.tensor([kind]),
        paint=torch.tensor([[1.0, 0.0, 1.0]]),
        pattern=torch.tensor([0]),
        badge=torch.tensor([0]),
        background=torch.tensor([BACKGROUNDS.index("grass")]),
        light=torch.ones(1),
    )
    red, green, blue = render(one)[0]
    magenta = ((red > 0.4) & (blue > 0.4) & (green < 0.25)).float().mean()
    assert 0.06 < magenta < 0.6


def test_patterns_and_badges_change_only_the_object():
    base, _ = scenes(1, seed=3)
    base = base.replace(pattern=torch.tensor([0]), badge=torch.tensor([0]))
    corner = (..., slice(0, 6), slice(0, 6))
    for changes in ({"pattern": torch.tensor([p])} for p in (1, 2, 3)):
        a, b = render(base), render(base.replace(**changes))
        assert not torch.equal(a, b) and torch.equal(a[corner], b[corner])
    for badge in (1, 2, 3):
        a, b = render(base), render(base.replace(badge=torch.tensor([badge])))
        assert not torch.equal(a, b) and torch.equal(a[corner], b[corner])


def test_a_full_caption_names_everything_that_has_a_name():
    some, named = scenes(200)
    for i in range(200):
        caption = scene_caption(some, named, i, random.Random(i), keep=1.0)
        words = caption.split()
        assert CLASSES[some.kind[i]] in words
        pattern, badge = PATTERNS[some.pattern[i]], BADGES[some.badge[i]]
        assert (pattern in words) == (pattern != "plain") or pattern == "plain"
        assert (badge in words) == (badge != "none")
        paint = int(named["paint"][i])
        assert paint < 0 or COLOR_NAMES[paint] in words
        if pattern != "plain" and paint >= 0:
            assert COLOR_NAMES[named["second"][i]] in words


def test_captions_leave_attributes_out():
    some, named = scenes(1, seed=5)
    said = {scene_caption(some, named, 0, random.Random(i)) for i in range(60)}
    assert len(said) > 10


def test_a_subject_keeps_its_identity_over_its_photos():
    one = subject(3)
    for name in IDENTITY:
        values = getattr(one.scenes, name)
        assert (values == values[:1]).all(), name
    assert len(set(one.scenes.background.tolist())) == 5
    assert torch.equal(one.images(), subject(3).images())


def test_splits_share_no_subject():
    paints = {tuple(s.scenes.paint[0].tolist()) for split in COUNTS for s in subjects(split)}
    assert len(paints) == sum(COUNTS.values())


def test_evaluation_prompts_put_the_subject_on_every_background_and_recolour_it():
    prompts = evaluation_prompts()
    assert len(prompts) == len(set(prompts)) == 20
    assert all("{0} {1}" in p for p in prompts)
    filled = " | ".join(p.format("<sks>", "ball") for p in prompts)
    for place in ("grass", "beach", "snow", "water", "wooden floor", "brick wall", "night sky", "pink fabric"):
        assert place in filled
