"""The prompts that a personalised subject is judged by: ZOODiP's Tables S2 and S3 (DreamBooth's own set).

Prompts are templates: `{0}` is the subject's token, `{1}` its class word, and `{}` stands for both together.
"""

from __future__ import annotations

import re

from mep_lightning.templates import IN_THE_STYLE_OF, tidy

_PLACES = (
    "a {0} {1} in the jungle",
    "a {0} {1} in the snow",
    "a {0} {1} on the beach",
    "a {0} {1} on a cobblestone street",
    "a {0} {1} on top of pink fabric",
    "a {0} {1} on top of a wooden floor",
    "a {0} {1} with a city in the background",
    "a {0} {1} with a mountain in the background",
    "a {0} {1} with a blue house in the background",
    "a {0} {1} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {0} {1}",
    "a purple {0} {1}",
    "a shiny {0} {1}",
    "a wet {0} {1}",
    "a cube shaped {0} {1}",
)
LIVING_PROMPTS: tuple[str, ...] = (
    *_PLACES,
    "a {0} {1} wearing a red hat",
    "a {0} {1} wearing a santa hat",
    "a {0} {1} wearing a rainbow scarf",
    "a {0} {1} wearing a black top hat and a monocle",
    "a {0} {1} in a chef outfit",
    "a {0} {1} in a firefighter outfit",
    "a {0} {1} in a police outfit",
    "a {0} {1} wearing pink glasses",
    "a {0} {1} wearing a yellow shirt",
    "a {0} {1} in a purple wizard outfit",
    *_PROPERTIES,
)
OBJECT_PROMPTS: tuple[str, ...] = (
    *_PLACES,
    "a {0} {1} with a wheat field in the background",
    "a {0} {1} with a tree and autumn leaves in the background",
    "a {0} {1} with the Eiffel Tower in the background",
    "a {0} {1} floating on top of water",
    "a {0} {1} floating in an ocean of milk",
    "a {0} {1} on top of green grass with sunflowers around it",
    "a {0} {1} on top of a mirror",
    "a {0} {1} on top of the sidewalk in a crowded street",
    "a {0} {1} on top of a dirt road",
    "a {0} {1} on top of a white rug",
    *_PROPERTIES,
)
STYLE_PROMPTS: tuple[str, ...] = tuple(
    f"a {thing} {IN_THE_STYLE_OF} {{}}"
    for thing in (
        *("cat", "dog", "horse", "bird", "butterfly", "woman", "man", "tree", "flower", "mountain", "river", "house"),
        *("castle", "bridge", "boat", "car", "bicycle", "teapot", "chair", "guitar"),
    )
)
"""Of a style: things that it is put on; ours, the papers give none."""

_LIVING = """
    animal baby bear bird boy bunny cat chicken corgi cow creature deer dog duck elephant fish fox frog girl goat
    hamster horse kitten lion lizard man monkey mouse owl panda parrot penguin person pet pig pony poodle puppy rabbit
    rat sheep sloth snake squirrel tiger turtle wolf woman
"""
_NOT_ALIVE = """
    backpack doll drawing figure figurine gummy hot plush plushie plushy rubber sculpture statue stuffed teddy toy
"""
LIVING_CLASSES = frozenset(_LIVING.split())


def is_living(class_word: str) -> bool:
    """Whether a class word names a living subject: `dog` and `corgi dog` do, `dog toy` and `teddy bear` do not."""
    words = re.findall(r"[a-z]+", class_word.lower())
    if not words or set(_NOT_ALIVE.split()) & set(words):
        return False
    many = words[-1]
    one = many.removesuffix("s"), re.sub("ies$", "y", many), re.sub("ves$", "f", many), re.sub("men$", "man", many)
    return not LIVING_CLASSES.isdisjoint((many, many.removesuffix("es"), *one))


def prompts_for(class_word: str | None, family: str | None = None, is_style: bool = False) -> tuple[str, ...]:
    """The evaluation prompts of a subject or a style, as templates.

    Args:
        class_word: what the subject is, such as `dog`; it decides between the living and the non-living set. None: it
            is a style.
        family: the base's family; `tiny` has prompts of its own, since it knows nothing of jungles.
        is_style: whether it is a style though it has a class word, such as watercolor.
    """
    from mep_lightning.tiny import evaluation_prompts, style_prompts

    if is_style or class_word is None:
        return tuple(style_prompts()) if family == "tiny" else STYLE_PROMPTS
    if family == "tiny":
        return tuple(evaluation_prompts())
    return LIVING_PROMPTS if is_living(class_word) else OBJECT_PROMPTS


def without_token(prompt: str, phrase: str) -> str:
    """The prompt in plain words, for scoring text: `a <sks> ball in the snow` becomes `a ball in the snow`, and
    `a cat in the style of <sks>` becomes `a cat`.

    A token of several vectors (`<sks> <sks>_1`, diffusers' way of writing it) goes as a whole.

    Args:
        prompt: with the subject in it.
        phrase: the token, or the token and its class word, which goes too where it names a style: of `<sks> watercolor`
            `a cat in the style of <sks> watercolor` becomes `a cat`.
    """
    if not phrase.strip():
        return tidy(prompt)
    token, *words = phrase.split()
    named = rf"{re.escape(token)}(_\d+)?(?![\w>])"
    tokens = rf"{named}(\s+{named})*"
    class_word = r"\s+".join(map(re.escape, words))
    style = rf"{IN_THE_STYLE_OF}\s+{tokens}" + (rf"(\s+(?i:{class_word})(?!\w))?" if words else "")
    plain = re.sub(rf"(?<![\w<])({style}|{tokens})('s\b)?\s*", "", prompt)
    return tidy(re.sub(r"\(\)|\"\"|''", "", plain))
