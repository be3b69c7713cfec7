"""Train with several values of some settings, and end in a table and a page.

    python scripts/sweep.py --base configs/tiny/dreambooth.yaml \\
        --set model.base_learning_rate=5e-5,1e-4 --set model.params.reg_weight=0,0.5,1 \\
        --actual_resume models/tiny/sd-tiny.safetensors --data_root photos --class_word dog ...
    python scripts/sweep.py SWEEP.yaml --engine local --workers 2

Every flag that is not named below goes to main.py, for every trial. The same command again goes on
where it was stopped. {outdir} has table.csv, index.html and a run folder for each trial.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ldm.commands import exit_status
from ldm.config import load_yaml, to_plain
from ldm.errors import UserError
from ldm.studies.flags import add_engine, engine_of
from ldm.studies.search import KINDS
from ldm.studies.sweep import PAGE, PLAN, TABLE, Plan, read_plan, run_sweep


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [SWEEP.yaml] [--set KEY=V1,V2 ...] [flags] [flags of main.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting")
    add("--search", choices=KINDS, help="default: grid")
    add("--trials", type=int, help="how many, of random and optuna")
    add("--search_seed", type=int, help="of random and optuna (default: 0)")
    add("--objective", help="what optuna makes larger; -NAME for smaller")
    add("--score", type=Path, metavar="FILE", help="YAML: how trained models are scored")
    add("--outdir", type=Path, help="default: outputs/sweeps/{name of the plan or config}")
    add_engine(parser)
    return parser


def values_of(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each `--set key=v1,v2`."""
    found: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--set {word}: expected KEY=V1,V2")
        if key in found:
            raise UserError(f"--set {key}: given twice")
        try:
            found[key] = yaml.safe_load(f"[{text}]")  # a list in a list keeps its commas
        except yaml.YAMLError as error:
            raise UserError(f"--set {word}: no YAML values") from error
    return found


def plan_of(args: argparse.Namespace, rest: list[str]) -> Plan:
    """Return the plan of a file, or of the flags."""
    changes = {
        "search": args.search,
        "trials": args.trials,
        "seed": args.search_seed,
        "objective": args.objective,
        "score": to_plain(load_yaml(args.score)) if args.score else None,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    if args.plan is not None:
        if args.set or given or rest:
            what = shlex.join([*(f"--set {word}" for word in args.set), *given, *rest])
            raise UserError(f"{what}: not together with {args.plan}, which says it all")
        return read_plan(args.plan)
    if not args.set:
        raise UserError("--set KEY=V1,V2: what should be tried? give it, or a SWEEP.yaml")
    return Plan.of({"arguments": rest, "set": values_of(args.set), **given})


def outdir_of(args: argparse.Namespace, plan: Plan) -> Path:
    """Return the sweep's folder: the given one, that of its plan, or one named after the config."""
    if args.outdir:
        return args.outdir
    if args.plan is not None:
        own = args.plan.name == PLAN  # the one inside a sweep's folder
        return args.plan.parent if own else Path("outputs/sweeps", args.plan.stem)
    pairs = itertools.pairwise(plan.arguments)
    bases = [word for before, word in pairs if before in ("-b", "--base")]
    return Path("outputs/sweeps", Path(bases[0]).stem if bases else "sweep")


def sweep(args: argparse.Namespace, rest: list[str]) -> int:
    """Run the sweep, and say where its results are."""
    plan = plan_of(args, rest)
    outdir = outdir_of(args, plan)
    engine = engine_of(args, outdir / "jobs", plan.search == "optuna")
    rows = run_sweep(plan, outdir, engine)
    failed = sum(row["status"] != "done" for row in rows)
    print(f"{len(rows) - failed} trials done, {failed} failed: {outdir / TABLE}, {outdir / PAGE}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse would take the value of a flag that is main.py's for the plan.
    has_plan = bool(words) and not words[0].startswith("-")
    plan = Path(words.pop(0)) if has_plan else None
    args, rest = build_parser().parse_known_args(words)
    args.plan = plan
    return exit_status(lambda: sweep(args, rest))


if __name__ == "__main__":
    sys.exit(main())
