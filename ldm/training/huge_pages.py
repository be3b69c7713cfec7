"""Pages of 2 MB for torch's tensors in the CPU's memory; without torch, which looks only before its first tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "THP_MEM_ALLOC_ENABLE"  # torch's, for tensors of 2 MB and more


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that a training by `config` should start with: none where it gives memory back between steps.

    The system fills huge pages in a fraction of the time of small ones.
    """
    lightning = config.get("lightning")  # of a config that nothing has checked
    callbacks = lightning.get("callbacks") if isinstance(lightning, Mapping) else None
    given_back = isinstance(callbacks, Mapping) and callbacks.get("host_memory", True) is None
    return {VARIABLE: "1"} if HUGE_PAGES.exists() and not given_back else {}


@contextmanager
def added(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, the process and those it starts have these variables beside their own, which go first."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
