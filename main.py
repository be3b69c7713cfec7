"""Train: `python main.py --base config.yaml -t ...`; see `--help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ldm import signals

if __name__ == "__main__":
    signals.hold()  # a signal may come while the rest is imported

from ldm import host
from ldm.commands import exit_status
from ldm.config import check_config
from ldm.distributed import is_child, is_first
from ldm.training import cli, defaults
from ldm.training.run import forget_stamp, held
from ldm.util import moved


def __getattr__(name: str) -> Any:
    return moved("main", name)  # what YAML files name as main.*, imported when asked for


def run(args: argparse.Namespace) -> int:
    """Check the config and train; return the exit status."""
    if is_child():
        host.end_with_parent()
    config, folder = cli.prepare(args)
    # The folder is this command's alone; huge pages come before Lightning, whose import makes a
    # tensor.
    pages = host.huge_pages_environment(config.content)
    with held(folder), host.environment_with(pages):
        check_config(config.content, defaults.TRAINER_KEYS)
        # Lightning takes seconds to import, which a mistyped flag or key need not wait for.
        from ldm.training.train import train

        train(config, folder, cli.start_of(args), test=not args.no_test)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    level = logging.INFO if is_first() else logging.ERROR  # of several processes, one tells
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    parsed = argparse.Namespace(debug=False)

    def command() -> int:
        vars(parsed).update(vars(cli.parse_args(argv)))
        return run(parsed)

    try:
        return exit_status(command, lambda: parsed.debug)
    finally:
        forget_stamp()


if __name__ == "__main__":
    sys.exit(main())
