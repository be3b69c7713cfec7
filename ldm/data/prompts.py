"""Captions from templates with an identifier and a class word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter

from ldm.errors import ParameterError, UserError, nearest

SUBJECT_TEMPLATE = "photo of a {identifier} {class_word}"
PRIOR_TEMPLATE = "photo of a {class_word}"
FIELDS = ("identifier", "class_word")
CLASS_MARK = "classword"  # stands for a class word while a template is read backwards


def captions_from_templates(
    placeholder_token: str = "dog",
    identifier: str = "sks",
    templates: str | Sequence[str] | None = None,
    coarse_class_text: str | None = None,
    reg: bool = False,
) -> list[str]:
    """Return the captions that the templates give for the class word `placeholder_token`.

    A template may hold `{identifier}` and `{class_word}`; a bare `{}` is the class word, before
    which `coarse_class_text` goes. The default is the subject's template, or the prior's with
    `reg`.

    Raises:
        UserError: a template that cannot be filled, or no class word.
    """
    if not str(placeholder_token or "").strip():
        raise ParameterError(
            "placeholder_token", "no class word; give --class_word, for example --class_word dog"
        )
    if templates is None:
        templates = PRIOR_TEMPLATE if reg else SUBJECT_TEMPLATE
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ParameterError("templates", "the list is empty; leave it out for the default")
    class_word = class_words(placeholder_token, coarse_class_text)
    captions = [_fill(template, identifier, class_word) for template in templates]
    return list(dict.fromkeys(captions))


def class_words(placeholder_token: str, coarse_class_text: str | None = None) -> str:
    """Return the class word, behind `coarse_class_text` if there is one."""
    return (
        f"{coarse_class_text} {placeholder_token}" if coarse_class_text else str(placeholder_token)
    )


def as_word(text: str) -> str:
    """Return the pattern of a text that stands for itself: `sks` in `sks's toy`, not in `masks`."""
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def without_identifier(caption: str, identifier: str, class_words: str) -> str:
    """Return a subject's caption as one of its class: `photo of a sks dog` is `photo of a dog`.

    Where the class is not named, it takes the identifier's place.
    """
    named = as_word(identifier)
    if re.search(as_word(class_words), caption, re.IGNORECASE):
        return re.sub(rf"{named}\s*", "", caption, flags=re.IGNORECASE).strip()
    return re.sub(named, lambda _: class_words, caption, flags=re.IGNORECASE)


def class_word_of(caption: str, templates: str | Sequence[str] | None = None) -> str | None:
    """Return the class word of a caption that one of the prior's templates made; None for
    others.
    """
    for template in captions_from_templates(CLASS_MARK, "", templates, reg=True):
        pattern = re.escape(template).replace(CLASS_MARK, "(.+)", 1).replace(CLASS_MARK, ".+")
        found = re.fullmatch(pattern, caption.strip(), re.IGNORECASE)
        if found and found.groups():
            return found[1]
    return None


def _fill(template: str, identifier: str, class_word: str) -> str:
    known = "known are {identifier}, {class_word} and {} (the class word)"
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        unknown = [field for field in fields if field not in (*FIELDS, "")]
        if unknown:
            hint = nearest(unknown[0], list(FIELDS))
            raise ParameterError(
                "templates", f"unknown field {{{unknown[0]}}} in {template!r}{hint}; {known}"
            )
        return template.format(
            *[class_word] * len(fields), identifier=identifier, class_word=class_word
        )
    except UserError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise ParameterError(
            "templates", f"{template!r} is no template ({error}); {known}"
        ) from error
