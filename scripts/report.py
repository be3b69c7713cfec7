"""Put runs side by side on one page: what differs between them, their losses, their last panels.

python scripts/report.py logs/RUN logs/OTHER --output compare.html
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.reports.runs import compare_page, read_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="default: here")
    return parser


def report(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        if not run.settings:
            raise UserError(f"{run.folder}: no configs in it: it is no run's folder")
    compare_page(runs, ", ".join(run.name for run in runs)).save(args.output)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
