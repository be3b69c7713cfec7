"""Find a rare word for a subject, and see what the model already knows of it.

    find=scripts/find_identifier.py
    python $find --ckpt models/tiny/sd-tiny.safetensors --class_word dog     # on a CPU
    python $find --ckpt sd-v1-4.ckpt --class_word dog --candidates 40        # on a GPU
    python $find --no_samples --class_word dog                               # the vocabulary alone
    python $find --no_samples --vocabulary spiece.model --tokens 1 2 3       # T5's
    python $find --ckpt sd-v1-4.ckpt --class_word dog --identifiers ohwx zwx # words of your own

The search is the paper's (Ruiz et al., 2208.12242): tokens of at most three characters are drawn
evenly from a window of ranks, 5000 to 10000 of T5's 32000 tokens, decoded to a word, and kept if
the word encodes to the same tokens. CLIP's vocabulary is ordered by its merges; the window there is
at the same shares of them, 7639 to 15279. Words that would read as the class word, as a word of the
prompt or as a common noun are left out.

What the model knows of a word is read off pictures from the same noises (0: nothing):
  concentration  how much more alike pictures of "photo of a WORD" are than those of "photo of a";
                 mean cosine of their features by CLIP's image tower
  pull           how far the word moves a picture of the class: 1 - cosine of "photo of a WORD dog"
                 and "photo of a dog" from the same noise
  leak           their sum; the table begins with the least. Behind it stands the difference to sks
                 with its 95 % interval over the noises: below 0, the word is better than sks
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.commands import exit_status
from ldm.data.prompts import SUBJECT_TEMPLATE, captions_from_templates
from ldm.errors import UserError
from ldm.evaluation.class_nouns import all_nouns
from ldm.evaluation.identifiers import (
    DEFAULT,
    Identifier,
    drawing,
    find_identifiers,
    identifier_of,
    known_of,
    table,
    words_of,
)
from ldm.evaluation.protocols import PAPER
from ldm.evaluation.vocabularies import clip_vocabulary, read_vocabulary
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.modules.encoders.t5 import FrozenT5Embedder
from ldm.sampling.text_to_image import Recipe, load_model, pick_device
from ldm.tiny.encoders import SIDE, image_tower

SAMPLER = "DPM++ 2M Karras"
# By whether the model is the miniature: steps and guidance.
SMALL, LARGE = (8, 4.0), (20, 7.5)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", help="the model that is to learn the subject")
    add("--config", help="its YAML (default: the checkpoint's own, or its family's)")
    add("--class_word", help="the subject's class noun, such as dog")
    add(
        "--prompt",
        default=SUBJECT_TEMPLATE,
        metavar="TEMPLATE",
        help="the caption of the photos (default: %(default)s)",
    )
    add("--no_samples", action="store_true", help="search the vocabulary alone, without a model")
    add("--vocabulary", type=Path, metavar="FILE", help="T5's spiece.model, or a tokenizer.json")
    add("--identifiers", nargs="+", metavar="WORD", help="judge these words instead of searching")
    add("--candidates", type=int, default=20, help="words to find (default: %(default)s)")
    add(
        "--tokens",
        type=int,
        nargs="+",
        choices=(1, 2, 3),
        default=[1],
        metavar="N",
        help="tokens that a word may have: 1, 2 or 3 (default: 1)",
    )
    add("--ranks", type=int, nargs=2, metavar=("LOW", "HIGH"), help="instead of the paper's window")
    add("--seed", type=int, default=0, help="of the search and of the noises")
    add("--samples", type=int, default=6, help="pictures of each prompt (default: %(default)s)")
    add("--steps", type=int, help="of the sampler (default: 20, of the miniature 8)")
    add("--scale", type=float, help="guidance (default: 7.5, of the miniature 4)")
    add("--clip", metavar="NAME", help=f"the CLIP that compares pictures: {PAPER.clip}, or a file")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--precision", choices=["full", "autocast"], default="autocast", help="on a GPU")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise a `UserError` for what can be refused before anything is read."""
    if args.no_samples and args.ckpt:
        raise UserError("--no_samples: draws nothing; leave --ckpt out")
    if not args.no_samples:
        if not args.ckpt:
            raise UserError("no model to ask: give --ckpt MODEL, or --no_samples")
        if not args.class_word:
            raise UserError("--class_word: needed to see how far a word moves the class")
    for name, least in (("candidates", 1), ("samples", 2), ("steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")
    if args.ranks and not 0 <= args.ranks[0] < args.ranks[1]:
        raise UserError(f"--ranks {args.ranks[0]} {args.ranks[1]}: expected 0 <= LOW < HIGH")
    if "{identifier}" not in args.prompt:
        raise UserError(f"--prompt {args.prompt!r}: expected a template with {{identifier}}")
    plain_prompt(args)  # raises for one that cannot be filled
    if not all(word.strip() for word in args.identifiers or []):
        raise UserError("--identifiers: a word is empty")


def plain_prompt(args: argparse.Namespace) -> str:
    """Return the prompt without an identifier."""
    # Where no class word is given, any noun stands for it: all of them are screened.
    class_word = args.class_word or all_nouns()[0]
    (plain,) = captions_from_templates(class_word, "", args.prompt)
    return plain


def find(args: argparse.Namespace) -> None:
    """Search the vocabulary, ask the model, print the table."""
    check_flags(args)
    found = candidates(args)
    known = None if args.no_samples else judged(args, found)
    print(table(found, known))
    print(f"\nThe default stays {DEFAULT}. Another: data.params.train.params.identifier=WORD")


def candidates(args: argparse.Namespace) -> list[Identifier]:
    """Return the words to look at, the default among them."""
    vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else clip_vocabulary()
    if args.identifiers:
        found = [identifier_of(vocabulary, word) for word in dict.fromkeys(args.identifiers)]
    else:
        screened = {*words_of(plain_prompt(args)), *words_of(" ".join(all_nouns()))}
        window = (args.ranks[0], args.ranks[1]) if args.ranks else None
        found = find_identifiers(
            vocabulary, args.candidates, screened, args.tokens, window, args.seed
        )
        low, high = window or vocabulary.window
        print(
            f"{len(found)} words of {vocabulary.name}'s vocabulary, ranks {low} to {high} of "
            f"{vocabulary.size}; screened against {len(screened)} words\n"
        )
    if DEFAULT not in [each.word for each in found]:
        found.append(identifier_of(vocabulary, DEFAULT))
    return found


def judged(args: argparse.Namespace, found: Sequence[Identifier]) -> Any:
    """Return what the model knows of each word."""
    device = pick_device(args.device)
    model = load_model(args.ckpt, args.config, device)
    check_reads(model, args)
    side = model.image_size * model.downsampling
    steps, scale = SMALL if side <= SIDE else LARGE
    sampler, schedule = find_sampler(SAMPLER)
    recipe = Recipe(
        steps=args.steps or steps,
        scale=scale if args.scale is None else args.scale,
        sampler=sampler,
        schedule=schedule,
        height=side,
        width=side,
        seed=args.seed,
    )
    precision = args.precision if device.type != "cpu" else "full"
    draw = drawing(model, recipe, precision)
    encode = image_tower(args.clip, side, device)
    words = [each.word for each in found]
    return known_of(words, args.class_word, args.prompt, args.samples, draw, encode)


def check_reads(model: Any, args: argparse.Namespace) -> None:
    """Raise a `UserError` if the words are of another vocabulary than the model reads."""
    is_t5 = isinstance(model.cond_stage_model, FrozenT5Embedder)
    if is_t5 and not args.vocabulary:
        raise UserError(f"{args.ckpt}: reads T5's words: give their file with --vocabulary")
    if args.vocabulary and not is_t5:
        raise UserError(
            f"--vocabulary {args.vocabulary}: {args.ckpt} reads CLIP's words: leave one of the two "
            "out, the model with --no_samples"
        )


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    return exit_status(lambda: find(args))


if __name__ == "__main__":
    sys.exit(main())
