"""Score anyone's pictures of a subject: DINO, CLIP-I, CLIP-T, PRES and DIV, by a named protocol.

    python scripts/evaluate.py --images outputs/dog --real photos/dog --prompts prompts.txt

Several subjects are folders of the same names in --images and --real; several trainings of one
are its folders seed1, seed2, .... The pictures' prompts come from their own metadata or from
--prompts. Every score is written with the protocol and the hashes of the encoders.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.commands import check_writable, exit_status
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.encoders import Encoders, load_encoders
from ldm.evaluation.folders import ORDERS, Place, places, prompts_of, read_prompts
from ldm.evaluation.protocols import (
    IDENTIFIERS,
    MINIATURE,
    PAIRINGS,
    PROTOCOLS,
    Protocol,
    find_protocol,
)
from ldm.evaluation.scores import REAL, SCORES, Group, Scored, score_group, score_real
from ldm.evaluation.tables import score_table
from ldm.files import write_atomically
from ldm.sampling.text_to_image import pick_device

# Which encoders each score needs.
NEEDS = {"DINO": "dino", "PRES": "dino", "CLIP-I": "clip", "CLIP-T": "clip", "DIV": "lpips"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="the generated pictures")
    add("--real", type=Path, required=True, metavar="DIR", help="the subject's photos")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line; .yaml, .json: see the docs")
    add(
        "--class_images", type=Path, metavar="DIR", help="generated pictures of the class, for PRES"
    )
    add("--order", choices=ORDERS, help="of several pictures a prompt, without their own metadata")
    add("--protocol", default="paper", help=f"{', '.join(PROTOCOLS)} (default: %(default)s)")
    add("--scores", nargs="+", choices=list(SCORES), help="default: all that can be computed")
    add("--dino", metavar="FILE", help="weights of the DINO encoder (default: timm's, by name)")
    add("--clip", metavar="FILE", help="weights of CLIP (default: open_clip's, by name)")
    add("--lpips", metavar="FILE", help="weights of LPIPS's backbone (default: torchvision's)")
    add("--dino_model", metavar="NAME", help="another encoder: the protocol is then custom")
    add("--clip_model", metavar="NAME", help="as above: architecture/weights of open_clip")
    add("--pairing", choices=PAIRINGS, help="as above")
    add("--identifier_in_text", choices=IDENTIFIERS, help="as above")
    add("--identifier", default="sks", help="default: %(default)s")
    add("--class_word", metavar="WORD", help="for --prompts with templates")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--output", type=Path, metavar="FILE", help="write the scores as JSON")
    return parser


def chosen_protocol(args: argparse.Namespace) -> Protocol:
    """Return the protocol that the flags name, custom where they change it."""
    protocol = find_protocol(args.protocol)
    if protocol == MINIATURE and (args.dino_model or args.clip_model or args.dino or args.lpips):
        raise UserError("--protocol miniature: has its own encoders; only --clip names a file")
    return protocol.having(
        dino=args.dino_model,
        clip=args.clip_model,
        pairing=args.pairing,
        identifier=args.identifier_in_text,
    )


def make_encoders(
    protocol: Protocol, files: Mapping[str, str | None], wanted: Sequence[str], device: Any
) -> Encoders:
    """Load a protocol's encoders; those of the miniature are its own."""
    if protocol.dino == MINIATURE.dino:
        from ldm.tiny.encoders import miniature_encoders

        return miniature_encoders(files.get("clip"))
    return load_encoders(protocol, files, wanted, device)


def wanted_encoders(args: argparse.Namespace, has_prompts: bool) -> list[str]:
    """Return the encoders to load: none that would compute no score."""
    scores = args.scores or [
        score
        for score in SCORES
        if (score != "PRES" or args.class_images) and (score != "DIV" or has_prompts)
    ]
    if "PRES" in scores and not args.class_images:
        raise UserError("--scores PRES: needs --class_images, generated pictures of the class")
    for score in ("CLIP-T", "DIV"):
        if args.scores and score in scores and not has_prompts:
            raise UserError(
                f"--scores {score}: the pictures' prompts are not known; give --prompts"
            )
    return sorted({NEEDS[score] for score in scores})


def evaluate(args: argparse.Namespace) -> None:
    """Find the pictures, score them, and print a table."""
    # What can be refused is refused before the encoders are loaded.
    protocol = chosen_protocol(args)
    if args.output:
        check_writable(args.output.parent, "choose another --output")
        if args.output.is_dir():
            raise UserError(f"--output {args.output}: is a folder; name a file in it")
    found = places(args.images, args.real, args.class_images)
    given = read_prompts(args.prompts, args.class_word, args.identifier) if args.prompts else None
    prompts = [prompts_of(place.images, given, args.order) for place in found]
    if protocol.images and any(each is None for each in prompts):
        logging.warning(
            "%s asks for %d pictures of each prompt. This is not checked: the pictures' prompts "
            "are not known; give --prompts",
            protocol.name,
            protocol.images,
        )
    wanted = wanted_encoders(args, any(each is not None for each in prompts))
    files = {"dino": args.dino, "clip": args.clip, "lpips": args.lpips}
    encoders = make_encoders(protocol, files, wanted, pick_device(args.device))

    # One group of pictures at a time, so that memory does not grow with their number.
    scored = Scored(protocol.name, encoders.hashes)
    real = Scored(protocol.name, encoders.hashes)
    seen: set[str] = set()
    for place, texts in zip(found, prompts):
        group = _group(place, texts)
        scores = _asked(score_group(group, encoders, protocol, args.identifier), args.scores)
        scored.rows.append({"subject": place.subject, "seed": place.seed, **scores})
        if place.subject not in seen:
            seen.add(place.subject)
            own = _asked(score_real(group.real, encoders), args.scores)
            real.rows.append({"subject": place.subject, "seed": "", **own})

    # The table, and the same as data.
    print(score_table({REAL: real, args.images.name or "images": scored}, protocol))
    if args.output:
        content = {
            "protocol": protocol.name,
            "source": protocol.source,
            "encoders": dict(encoders.hashes),
            "images": scored.rows,
            "real": real.rows,
        }
        text = json.dumps(content, indent=1)
        write_atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))


def _group(place: Place, prompts: Sequence[str] | None) -> Group:
    pictures, real, of_class = (
        [load_image(path) for path in paths] for paths in (place.images, place.real, place.of_class)
    )
    return Group(place.subject, pictures, prompts, real, of_class, place.seed)


def _asked(scores: Mapping[str, float], names: Sequence[str] | None) -> dict[str, float]:
    return {name: value for name, value in scores.items() if not names or name in names}


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
