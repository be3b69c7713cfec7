"""Several datasets as one: which of them has its turn at each position of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm.data.streams import Batch, Stream, collated, count_images
from ldm.errors import ParameterError, check_counts, check_positive

DIGITS = 100  # a weight has two decimals
LONGEST = 1_000_000  # examples until the turns repeat themselves


class Turns:
    """Which subject is at position g, and how many of its examples came before: a function of g.

    Args:
        weights: how often each has its turn, beside the others.
        turn: examples of weight 1 that come one after another; None to mix all as evenly as
            possible.

    Raises:
        UserError: a weight that is not positive or has more than two decimals, or a `turn` that
            the weights do not divide into whole examples.
    """

    def __init__(self, weights: Sequence[float], turn: int | None = None):
        for number, weight in enumerate(weights):
            where = f"concepts[{number}].weight"
            check_positive(where, weight)
            if abs(weight * DIGITS - round(weight * DIGITS)) > 1e-9 or round(weight * DIGITS) < 1:
                raise ParameterError(where, f"expected two decimals at most, got {weight}")
        if turn is not None:
            check_counts(turn=turn)
        counts = [round(weight * DIGITS) for weight in weights]
        if turn is None:
            shared = math.gcd(*counts)
            counts = [count // shared for count in counts]
            self._places = _evenly(counts) if sum(counts) <= LONGEST else []
        else:
            blocks = _blocks(counts, turn)
            self._places = _in_blocks(blocks) if sum(blocks) <= LONGEST else []
        if not self._places:
            raise ParameterError("turn", f"more than {LONGEST} examples until turns repeat")
        # How many examples each has before every place of a period, and in a whole one.
        self._before: list[int] = []
        self._total = [0] * len(weights)
        for place in self._places:
            self._before.append(self._total[place])
            self._total[place] += 1

    def at(self, g: int) -> tuple[int, int]:
        """Return whose turn position g is, and the number of its examples before."""
        period, place = divmod(g, len(self._places))
        subject = self._places[place]
        return subject, period * self._total[subject] + self._before[place]


def _evenly(counts: Sequence[int]) -> list[int]:
    """Return a period in which each number comes up `counts` times, as evenly as possible."""
    # In each place every subject earns its count; who has most pays for the place.
    earned, places = [0] * len(counts), []
    for _ in range(sum(counts)):
        earned = [have + count for have, count in zip(earned, counts)]
        richest = max(range(len(counts)), key=earned.__getitem__)
        earned[richest] -= sum(counts)
        places.append(richest)
    return places


def _blocks(counts: Sequence[int], turn: int) -> list[int]:
    """Return how many examples of each come in a row; `counts` are the weights in hundredths."""
    unit = DIGITS // math.gcd(DIGITS, *counts)
    if turn % unit:
        problem = f"expected a multiple of {unit}, so that turn x weight is whole, got {turn}"
        raise ParameterError("turn", problem)
    return [count * turn // DIGITS for count in counts]


def _in_blocks(sizes: Sequence[int]) -> list[int]:
    return [number for number, size in enumerate(sizes) for _ in range(size)]


class StreamsInTurn:
    """Streams of several datasets as one, which takes its examples from them in turn.

    With one stream, it is that stream.
    """

    def __init__(self, streams: Sequence[Stream], turns: Turns):
        self.streams, self.turns = list(streams), turns

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    def at(self, g: int) -> tuple[Stream, int]:
        """Return the stream that position g is of, and the position in it."""
        number, position = self.turns.at(g)
        return self.streams[number], position

    def __getitem__(self, g: int) -> dict[str, Any]:
        stream, position = self.at(g)
        return stream[position]

    def batch(self, positions: list[int]) -> Batch:
        """Return the collated examples at `positions`."""
        return collated([self[g] for g in positions])


class Together(Dataset):
    """The images of several datasets, one dataset after another, each image once."""

    def __init__(self, datasets: Sequence[Any]):
        self.datasets = list(datasets)

    @property
    def n_images(self) -> int:
        """Count the images of all."""
        return sum(map(count_images, self.datasets))

    @property
    def size(self) -> int | None:
        """Return the side of the images, which all share."""
        return getattr(self.datasets[0], "size", None)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(range(len(self))[index])

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return image `index`, augmented with numbers from `generator`."""
        index %= self.n_images
        for dataset in self.datasets:
            count = count_images(dataset)
            if index < count:
                return dataset.example(index, generator)
            index -= count
        raise IndexError(index)

    def without_augmentation(self) -> Together:
        """Return the same images without mirroring and cropped in the middle."""
        plain = copy.copy(self)
        plain.datasets = [dataset.without_augmentation() for dataset in self.datasets]
        return plain
