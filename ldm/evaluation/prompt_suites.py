"""Suites of prompts: YAML lists of templates over `{subject}` and `{class}`, one file for each
application.

`configs/prompts` has those for real models, `configs/prompts/tiny` those for the miniature.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from string import Formatter

import yaml

from ldm.config import PROJECT
from ldm.data.captions import read_text
from ldm.errors import UserError, nearest

log = logging.getLogger(__name__)

FOLDER = PROJECT / "configs" / "prompts"
FIELDS = ("subject", "class")


def read_suite(path: str | Path) -> list[str]:
    """Read the templates of a suite.

    Raises:
        UserError: no such file, no list of texts, or a template with another field.
    """
    path = Path(path)
    try:
        templates = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: cannot read this suite of prompts ({problem})") from error
    if (
        not isinstance(templates, list)
        or not templates
        or not all(isinstance(t, str) for t in templates)
    ):
        raise UserError(
            f"{path}: expected a YAML list of prompts, a line each: - a {{subject}} in the snow"
        )
    for template in templates:
        _check(template, path)
    return templates


def _check(template: str, path: Path) -> None:
    """Raise a `UserError` where a template has a field that is not known, or none."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{path}: {template!r} is no template ({error})") from error
    for _, field, form, conversion in parts:
        if form or conversion:
            raise UserError(f"{path}: {template!r}: write {{{field}}} without a format")
        if field not in FIELDS:
            hint = nearest(str(field), set(FIELDS))
            raise UserError(
                f"{path}: unknown field {{{field}}} in {template!r}{hint}; known are "
                f"{{subject}}, {{class}}"
            )
    if not parts:
        raise UserError(f"{path}: {template!r} names neither {{subject}} nor {{class}}")


def filled(templates: list[str], class_word: str, identifier: str = "sks") -> list[str]:
    """Return the prompts of a suite for a subject: "a sks dog in the snow"."""
    subject = f"{identifier} {class_word}"
    return [template.format(subject=subject, **{"class": class_word}) for template in templates]


def find_suite(name: str | Path) -> Path:
    """Return the file of a suite: a path, or a name in `configs/prompts`, such as `art`.

    Raises:
        UserError: there is no such suite.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = FOLDER / f"{name}.yaml"
    if found.is_file():
        return found
    known = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.yaml"))
    hint = nearest(str(name), known)
    raise UserError(f"{name}: no such suite of prompts{hint}; there are {', '.join(known)}")


def suite_prompts(name: str | Path, subject: str | None) -> list[str]:
    """Return the prompts of a suite for a subject: its identifier, then its class word: `sks dog`.

    Raises:
        UserError: no such suite, or no such subject.
    """
    identifier, _, class_word = (subject or "").strip().partition(" ")
    if not class_word:
        problem = f"'{subject}'" if subject else "is not given"
        raise UserError(f"subject {problem}: a suite needs identifier and class word, as 'sks dog'")
    return filled(read_suite(find_suite(name)), class_word.strip(), identifier)


def asked_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts that the flags of a sampling command ask for: one, a file's or a suite's.

    Raises:
        UserError: a file or a suite that is not there, or without prompts, or both of them; a
            subject for which there is no suite.
    """
    # Without this line, the prompt would be drawn as it is, which names no subject.
    if args.subject and not args.suite:
        raise UserError(f"--subject '{args.subject}': is for --suite, which is not given")
    if args.suite and args.from_file:
        raise UserError("--suite and --from-file: both give the prompts: leave one out")
    if "prompt" in args.given and (args.suite or args.from_file):
        log.warning(
            "--prompt: not read: --%s gives the prompts", "suite" if args.suite else "from-file"
        )
    if args.suite:
        return suite_prompts(args.suite, args.subject)
    if args.from_file:
        return _prompts_of_file(Path(args.from_file), args)
    return [args.prompt]


def _prompts_of_file(path: Path, args: argparse.Namespace) -> list[str]:
    """Return the lines of a file that are prompts, and say what is made of them."""
    if not path.is_file():
        raise UserError(f"--from-file {path}: no such file")
    lines = [line.strip() for line in read_text(path, "file of prompts").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--from-file {path}: no prompts in it")

    # Say what becomes of the file: of a single --prompt, --n_samples pictures are drawn.
    comments = sum(line.startswith("#") for line in lines)
    left_out = f" ({comments} comments left out)" if comments else ""
    count = len(prompts) * args.n_iter
    rest = count % args.n_samples
    last = f", the last of {rest}" if rest else ""
    log.info(
        "%s: %d prompts%s in batches of %d%s", path, len(prompts), left_out, args.n_samples, last
    )
    log.info("each prompt is drawn %d times, as --n_iter says", args.n_iter)
    return prompts
