"""Where the time of a run goes."""

from __future__ import annotations

import time

SHOWN = 0.05  # seconds; a shorter stage is not told


class Stages:
    """Seconds of the wall's clock by stage, from the moment that this is made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """Count the time since the last end for a stage; a name may come again."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        told = [(name, value) for name, value in self.seconds.items() if value >= SHOWN]
        return ", ".join(f"{name} {value:.1f} s" for name, value in told)
