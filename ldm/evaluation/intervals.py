"""Bootstrap intervals of a mean over subjects and their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval; None where a single value has none."""

    mean: float
    low: float | None = None
    high: float | None = None
    count: int = 1

    def __str__(self) -> str:
        return self.written()

    def written(self, signed: bool = False) -> str:
        """Return the mean and its interval; signed, with a + or - before each: a difference."""
        form = "+.3f" if signed else ".3f"
        if self.low is None or self.high is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def estimate(values: Mapping[str, Sequence[float]], seed: int = 0) -> Estimate:
    """Return the mean over subjects of the mean over each one's seeds, with its interval.

    Subjects are drawn with replacement, and then the seeds of each drawn subject: both the choice
    of subjects and the luck of a training are in the interval. Its ends are percentiles.

    Args:
        values: of each subject, one for each seed.
        seed: of the draws. The same values have the same interval in any order.
    """
    groups = sorted(sorted(map(float, group)) for group in values.values() if len(group))
    if not groups:
        raise ValueError("no values to estimate a mean of")
    count = sum(map(len, groups))
    mean = float(np.mean([np.mean(group) for group in groups]))
    if count == 1:
        return Estimate(mean)
    random = np.random.default_rng(seed)
    sizes = np.array([len(group) for group in groups])
    padded = np.zeros((len(groups), sizes.max()))
    for row, group in zip(padded, groups):
        row[: len(group)] = group
    means = np.zeros(DRAWS)
    for _ in groups:
        subject = random.integers(len(groups), size=DRAWS)
        total = np.zeros(DRAWS)
        for position in range(sizes.max()):
            chosen = (random.random(DRAWS) * sizes[subject]).astype(int)
            total += np.where(position < sizes[subject], padded[subject, chosen], 0.0)
        means += total / sizes[subject] / len(groups)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), count)
