"""The evaluation prompts and how a subject gets into and out of them."""

from __future__ import annotations

import pytest

from mep_lightning.evaluation.prompts import (
    LIVING_PROMPTS,
    OBJECT_PROMPTS,
    is_living,
    prompts_for,
    without_token,
)
from mep_lightning.templates import fill


def test_both_sets_hold_25_different_prompts_with_a_token_and_a_class_word():
    for prompts in (LIVING_PROMPTS, OBJECT_PROMPTS):
        assert len(set(prompts)) == len(prompts) == 25
        assert all(prompt.count("{0} {1}") == 1 for prompt in prompts)


def test_the_sets_share_places_and_properties_and_differ_between():
    assert LIVING_PROMPTS[:10] == OBJECT_PROMPTS[:10]
    assert LIVING_PROMPTS[20:] == OBJECT_PROMPTS[20:]
    assert not set(LIVING_PROMPTS[10:20]) & set(OBJECT_PROMPTS[10:20])


@pytest.mark.parametrize(
    ("number", "living", "text"),
    [
        (1, True, "a <sks> dog in the jungle"),
        (14, True, "a <sks> dog wearing a black top hat and a monocle"),
        (20, True, "a <sks> dog in a purple wizard outfit"),
        (25, True, "a cube shaped <sks> dog"),
        (13, False, "a <sks> dog with the Eiffel Tower in the background"),
        (14, False, "a <sks> dog floating on top of water"),
        (18, False, "a <sks> dog on top of the sidewalk in a crowded street"),
        (21, False, "a red <sks> dog"),
    ],
)
def test_prompts_are_numbered_as_in_the_papers_tables(number, living, text):
    prompts = LIVING_PROMPTS if living else OBJECT_PROMPTS
    assert prompts[number - 1].format("<sks>", "dog") == text == fill(prompts[number - 1], "<sks> dog", "dog")


@pytest.mark.parametrize(
    ("class_word", "living"),
    [
        ("dog", True),
        ("Cat", True),
        ("corgi dog", True),
        ("dogs", True),
        ("backpack", False),
        ("stuffed animal", False),
        ("dog toy", False),
        ("toy", False),
        ("hot dog stand", False),
        ("hot dog", False),
        ("teddy bear", False),
        ("rubber duck", False),
        ("backpack dog", False),
        ("wolves", True),
        ("puppies", True),
        ("foxes", True),
        ("women", True),
        ("", False),
    ],
)
def test_the_class_word_decides_which_set_is_used(class_word, living):
    assert is_living(class_word) is living
    assert prompts_for(class_word) == (LIVING_PROMPTS if living else OBJECT_PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a <sks> ball in the snow", "a ball in the snow"),
        ("a <sks> <sks>_1 <sks>_2 ball", "a ball"),
        ("a ball, <sks>, on grass", "a ball,, on grass"),
        ("a picture in the style of <sks>", "a picture"),
        ("a <skscraper> and a <sks>ball", "a <skscraper> and a <sks>ball"),
        ('a photo of a "<sks>" toy', "a photo of a toy"),
        ("a (<sks> dog) in snow", "a (dog) in snow"),
        ("a <sks>'s hat", "a hat"),
    ],
)
def test_the_token_and_only_the_token_leaves_the_prompt(prompt, text):
    assert without_token(prompt, "<sks>") == text
    assert without_token(prompt, " ") == prompt
