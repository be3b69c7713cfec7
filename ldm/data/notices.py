"""Say a thing once, however many datasets or workers come across it."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged the same one before."""
    log.warning("%s", message)
