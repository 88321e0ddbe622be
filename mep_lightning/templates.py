"""Prompts with a hole: each holds "{}" where the subject's phrase ("<sks> ball") goes.

The two lists are those of Textual Inversion (Gal et al. 2022, arXiv 2208.01618, appendix), 27 for objects and 19 for
styles, in their order; two of the style list stand there twice, as they do here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mep_lightning.errors import UserError

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

IN_THE_STYLE_OF = "in the style of"
TAG = r"<[^<>\s:]+:[^<>]*>"
"""What A1111 reads in a prompt as a setting, such as `<lora:add_detail:0.6>`."""


def choose_templates(templates: Literal["object", "style"] | Sequence[str]) -> tuple[str, ...]:
    """The templates that a name stands for, or the user's own once each is seen to have its hole.

    Raises:
        UserError: an unknown name, an empty list, or a template without "{}".
    """
    if templates == "object":
        return OBJECT_TEMPLATES
    if templates == "style":
        return STYLE_TEMPLATES
    if isinstance(templates, str):
        raise UserError(f'data.templates is "{templates}": use object, style, or a list of prompts with {{}} in each')
    if not templates:
        raise UserError("data.templates is an empty list: use object, style, or at least one prompt with {} in it")
    for template in templates:
        if "{}" not in template:
            raise UserError(f'data.templates holds "{template}": put {{}} where the subject goes')
    return tuple(templates)


def caption_to_template(caption: str, class_word: str | None, token: str | None = None, is_style: bool = False) -> str:
    """Make the hole in a caption: where it says so, at its token, at the class word, or else in front.

    "a {} on grass" stays; "a <sks> ball on grass" and "a ball on grass" become "a {} on grass"; "on grass" becomes
    "{}, on grass". Of a style "a ball on grass" becomes "a ball on grass in the style of {}". Tags such as A1111's
    `<lora:add_detail:0.6>`, a name with a colon in angle brackets, are no words of a prompt and are left out.

    Args:
        caption: free text; line breaks and runs of spaces become one space.
        class_word: what the photos show; replaced where it first stands as a word of its own, in any case. None: they
            share a style.
        token: the subject's token where it has no angle brackets; a `<name>` is recognised without.
        is_style: whether they share a style though there is a class word, such as watercolor.
    """
    caption = _without_tags(" ".join(caption.split()), token)
    if "{}" in caption:
        return caption
    if not caption:
        return "{}"
    names = r"<[^<>\s:]+>" + (f"|{re.escape(token)}" if token else "")
    subjects = [rf"(?:{names})"]
    if class_word is not None:
        noun = re.escape(class_word)
        subjects = [rf"(?:{names})(?:\s+{noun})?", noun]
    for subject in subjects:
        found = re.search(rf"(?<!\w){subject}(?!\w)", caption, re.IGNORECASE)
        if found:
            return f"{caption[: found.start()]}{{}}{caption[found.end() :]}"
    is_style = is_style or class_word is None
    return f"{caption.rstrip('.')} {IN_THE_STYLE_OF} {{}}" if is_style else f"{{}}, {caption}"


def _without_tags(caption: str, token: str | None) -> str:
    """A caption without tags but the subject's token, and without the commas around them."""
    words = re.sub(TAG, lambda tag: tag[0] if tag[0] == token else "", caption)
    return caption if words == caption else re.sub(r"(,\s*)+", ", ", tidy(words)).strip(" ,")


def fill(template: str, phrase: str, class_word: str | None = None) -> str:
    """Put a subject into a prompt; other braces are left alone, as `str.format` would not.

    Args:
        template: a prompt with `{}` (or DreamBooth's `{0} {1}`) where the subject goes; without either it stays.
        phrase: the adapter's phrase for the subject, such as `<sks> ball`.
        class_word: the phrase's last part, needed only where `{0}` and `{1}` stand apart.
    """
    token = phrase.removesuffix(class_word).strip() if class_word else phrase
    text = template.replace("{0} {1}", phrase).replace("{}", phrase)
    return tidy(text.replace("{0}", token).replace("{1}", class_word or ""))


def tidy(text: str) -> str:
    """Single spaces, and none before a comma or full stop."""
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
