"""The DreamBooth paper's protocol: fine-tune on each subject, draw its prompts, score; one row a
method.

    git clone (the published repository google/dreambooth)
    python scripts/dreambench.py --dataset dreambooth/dataset --ckpt sd-v1-5.ckpt \\
        --base configs/stable-diffusion/v1-finetune_unfrozen.yaml --gpus 0, \\
        --method dreambooth --method no-prior

Whole: 30 subjects x 25 prompts x 4 pictures. Every flag that is not named below goes to main.py.
The same command again goes on where it was stopped, at the next picture. {outdir} has table.md,
scores.csv and index.html.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.commands import exit_status
from ldm.config import load_yaml, to_plain
from ldm.errors import UserError, check_once, nearest
from ldm.evaluation.dreambench import read_dataset
from ldm.evaluation.protocols import PROTOCOLS
from ldm.studies.dreambench import METHODS, PAGE, TABLE, Bench, Method, run_bench
from ldm.studies.flags import add_engine, engine_of
from ldm.studies.scoring import Scoring


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="DIR", help="with prompts_and_classes.txt")
    add("--ckpt", type=Path, required=True, help="the base model's weights")
    add(
        "--method",
        action="append",
        default=[],
        metavar="NAME[=FLAGS]",
        help=f"{', '.join(METHODS)}, or a name with flags of main.py: "
        "'slow=--max_steps 2000 model.base_learning_rate=1e-6'; "
        "'lora-fast=lora model.base_learning_rate=4e-4' changes a known one (default: dreambooth)",
    )
    add("--subjects", nargs="+", metavar="NAME", help="default: all")
    add("--seeds", nargs="+", type=int, default=[23], help="of the trainings (default: 23)")
    add("--identifier", default="sks", help="default: %(default)s")
    add("--protocol", help=f"{', '.join(PROTOCOLS)} (default: paper)")
    add("--score", type=Path, metavar="FILE", help="YAML: sampling and encoders, see the docs")
    add("--outdir", type=Path, default=Path("outputs/dreambench"), help="default: %(default)s")
    add_engine(parser)
    return parser


def methods_of(given: Sequence[str]) -> dict[str, Method]:
    """Return the methods by name."""
    found: dict[str, Method] = {}
    for text in given or ["dreambooth"]:
        name, equals, words = text.partition("=")
        if not equals and name not in METHODS:
            known = ", ".join(METHODS)
            hint = nearest(name, METHODS)
            raise UserError(f"--method {name}: unknown{hint}; known are {known}; or NAME=FLAGS")
        if not name.replace("-", "").replace("_", "").isalnum() or name in found:
            raise UserError(f"--method {text}: expected a name of its own, of letters and digits")
        found[name] = _own_method(shlex.split(words)) if equals else METHODS[name]
    return found


def _own_method(words: list[str]) -> Method:
    """Return a method of flags, which may begin with the name of one that they change."""
    if not words or words[0] not in METHODS:
        return Method(words)
    known = METHODS[words[0]]
    return replace(known, arguments=[*known.arguments, *words[1:]])


def bench_of(args: argparse.Namespace, rest: list[str]) -> Bench:
    """Return what the flags ask for."""
    if not args.ckpt.exists():
        raise UserError(f"--ckpt {args.ckpt}: no such file or folder")
    check_once("--seeds", args.seeds)
    given = to_plain(load_yaml(args.score)) if args.score else {}
    if args.protocol:
        given["protocol"] = args.protocol
    scoring = Scoring.of(given, "score")
    subjects = read_dataset(args.dataset, args.subjects)
    common = ["--actual_resume", str(args.ckpt), *rest]
    methods = methods_of(args.method)
    scoring.load()  # an encoder that is not there shows now, not after the trainings
    return Bench(subjects, methods, common, args.seeds, scoring, args.ckpt, args.identifier)


def dreambench(args: argparse.Namespace, rest: list[str]) -> None:
    """Run the protocol, and print its table."""
    bench = bench_of(args, rest)
    engine = engine_of(args, args.outdir / "jobs")
    run_bench(bench, args.outdir, engine)
    print((args.outdir / TABLE).read_text(encoding="utf-8"))
    print(args.outdir / PAGE)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args, rest = build_parser().parse_known_args(argv)
    return exit_status(lambda: dreambench(args, rest))


if __name__ == "__main__":
    sys.exit(main())
