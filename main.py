"""Train: `python main.py --base config.yaml -t ...`; see `--help`."""

from __future__ import annotations

import errno
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ldm.config import check_config
from ldm.errors import UserError
from ldm.training import cli, defaults

# What YAML files name as main.*, imported when asked for.
EXPORTS = {
    "DataModuleFromConfig": "ldm.data.datamodule",
    "ImageLogger": "ldm.callbacks.image_logger",
    "SetupCallback": "ldm.callbacks.setup",
}


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(importlib.import_module(EXPORTS[name]), name)
    raise AttributeError(f"module 'main' has no attribute '{name}'")


def run(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train; the exit status."""
    args = cli.parse_args(argv)
    config, folder = cli.prepare(args)
    check_config(config, defaults.TRAINER_KEYS)
    # Lightning takes seconds to import, which a mistyped flag or key need not wait for.
    from ldm.training.train import INTERRUPTED, train

    trained = train(config, folder, cli.start_of(args), test=not args.no_test)
    return INTERRUPTED if trained.interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """`run`, with what the user can mend told in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments)
    except UserError as error:
        if {"-d", "--debug"} & set(arguments):
            raise
        logging.getLogger(__name__).error("error: %s", error)
        return 1
    except OSError as error:  # a full disk or a folder without write permission, met while logging
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "the run folder"
        logging.getLogger(__name__).error("error: %s: %s: make room, or choose another --logdir", where, error.strerror)
        return 1


if __name__ == "__main__":
    sys.exit(main())
