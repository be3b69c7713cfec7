"""A measurement in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ldm.errors import UserError
from ldm.host import environment_with


def in_own_process(
    function: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run a function in a fresh process with further environment variables, and return its result.

    Raises:
        UserError: the process was killed; and what the function raises.
    """
    # Not a multiprocessing.Pool, whose processes may have no children: data loaders start some.
    context = multiprocessing.get_context("spawn")
    with environment_with(environment or {}), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the measuring process was killed; most often it had not enough memory"
            ) from error
