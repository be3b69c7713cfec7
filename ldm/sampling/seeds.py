"""The seed that a command is given: which ones there are, and -1, which chooses one."""

from __future__ import annotations

import logging
import secrets

from ldm.distributed import agreed
from ldm.errors import UserError

log = logging.getLogger(__name__)

RANDOM = -1  # the seed that asks for another one each time
SEEDS = 2**64  # how many seeds there are in the programs that have the most


def check_seed(seed: int) -> None:
    """Raise a `UserError` for a seed that other programs do not have; -1 asks for a random one."""
    if seed != RANDOM and not 0 <= seed < SEEDS:
        raise UserError(
            f"--seed {seed}: expected a whole number from 0 to {SEEDS - 1}, or {RANDOM}"
        )


def chosen_seed(given: int) -> int:
    """Return the seed, or a random one where -1 asks for it, as in AUTOMATIC1111's web UI."""
    if given != RANDOM:
        return given
    seed = int(agreed(lambda: str(secrets.randbelow(2**32))))
    log.info("--seed -1: the seed is %d", seed)
    return seed
