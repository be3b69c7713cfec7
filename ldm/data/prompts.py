"""Captions: from templates with an identifier and a class word, or from a text file beside the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from ldm.errors import ParameterError, UserError, nearest

SUBJECT_TEMPLATE = "photo of a {identifier} {class_word}"
PRIOR_TEMPLATE = "photo of a {class_word}"
FIELDS = ("identifier", "class_word")


def captions_from_templates(
    placeholder_token: str = "dog",
    identifier: str = "sks",
    templates: str | Sequence[str] | None = None,
    coarse_class_text: str | None = None,
    reg: bool = False,
) -> list[str]:
    """The captions that the templates give for the class word `placeholder_token`.

    A template may hold `{identifier}` and `{class_word}`; a bare `{}` is the class word, before which
    `coarse_class_text` goes. The default is the subject's template, or the prior's with `reg`.

    Raises:
        UserError: a template that cannot be filled, or no class word.
    """
    if not placeholder_token:
        raise ParameterError("placeholder_token", "no class word; give --class_word, for example --class_word dog")
    if templates is None:
        templates = PRIOR_TEMPLATE if reg else SUBJECT_TEMPLATE
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ParameterError("templates", "the list is empty; leave it out for the default")
    class_word = f"{coarse_class_text} {placeholder_token}" if coarse_class_text else str(placeholder_token)
    captions = [_fill(template, identifier, class_word) for template in templates]
    return list(dict.fromkeys(captions))


def _fill(template: str, identifier: str, class_word: str) -> str:
    known = "known are {identifier}, {class_word} and {} (the class word)"
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        if unknown := [field for field in fields if field not in (*FIELDS, "")]:
            hint = nearest(unknown[0], list(FIELDS))
            raise ParameterError("templates", f"unknown field {{{unknown[0]}}} in {template!r}{hint}; {known}")
        return template.format(*[class_word] * len(fields), identifier=identifier, class_word=class_word)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise ParameterError("templates", f"{template!r} is no template ({error}); {known}") from error


def caption_beside(image: Path, may_be_empty: bool = False) -> str | None:
    """The text of the file beside `image` (dog.txt for dog.jpg), or None if there is none.

    Raises:
        UserError: the file is no UTF-8 text, or is empty and may not be.
    """
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this caption ({error}); save it as UTF-8 text") from error
    if not text and not may_be_empty:
        raise UserError(f"{path}: this caption is empty; write one, or remove the file to use the templates")
    return text
