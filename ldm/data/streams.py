"""Examples in an order in which every random choice is a function of the seed and a position.

The position g of a training example counts the examples that the whole run, over all ranks,
consumes before it. Which image g is, how it is augmented and the seed of its noise are hashes of
(seed, g). So the examples do not depend on the batch size, the ranks, the workers or on where a run
was stopped and resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ldm.errors import UserError
from ldm.rng import derive_seed, generator

log = logging.getLogger(__name__)

# image (b, h, w, c) in [-1, 1], caption list[str], noise_seed (b,) int64; with masks, mask (b, h,
# w)
Batch = dict[str, Any]


@runtime_checkable
class Seeded(Protocol):
    """A dataset that draws what is random from a generator that it is given."""

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return item `index`."""


@runtime_checkable
class CountsImages(Protocol):
    """A dataset that knows how many images it has, which its length may repeat."""

    @property
    def n_images(self) -> int:
        """Count the images."""


def count_images(dataset: Any) -> int:
    """Count the images of a dataset; one that does not say has as many as items."""
    return dataset.n_images if isinstance(dataset, CountsImages) else len(dataset)


class Stream:
    """An endless sequence of a dataset's examples, each a function of `(seed, role, g)`.

    With `shuffle`, every pass over the images has its own order; otherwise example g is item g.
    """

    def __init__(self, dataset: Dataset, seed: int, role: str, shuffle: bool = True):
        self.dataset, self.seed, self.role, self.shuffle = dataset, seed, role, shuffle
        # A dataset that repeats its images is permuted image by image, so that none comes twice
        # before all came once.
        self.n_images = count_images(dataset)
        self._pass, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def at(self, g: int) -> tuple[Stream, int]:
        """Return the stream that position g is of, and the position in it: this one."""
        return self, g

    def index(self, g: int) -> int:
        """Return which item of the dataset stands at position g."""
        if not self.shuffle:
            return g
        number, place = divmod(g, self.n_images)
        if number != self._pass:
            draws = generator(self.seed, "order", self.role, number)
            self._pass, self._order = number, torch.randperm(self.n_images, generator=draws)
        return int(self._order[place])

    def __getitem__(self, g: int) -> dict[str, Any]:
        example = self._augmented(self.index(g), (self.seed, "augment", self.role, g))
        return {**example, "noise_seed": derive_seed(self.seed, "noise", self.role, g)}

    def _augmented(self, index: int, keys: tuple[int | str, ...]) -> dict[str, Any]:
        if isinstance(self.dataset, Seeded):
            return self.dataset.example(index, generator(*keys))
        # Another's dataset draws from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(*keys))
            return self.dataset[index]

    def batch(self, positions: list[int]) -> Batch:
        """Return the collated examples at `positions`."""
        return collated([self[g] for g in positions])


def collated(examples: list[dict[str, object]]) -> Batch:
    """Return examples as one batch; raise a `UserError` if their sizes differ."""
    check_same_size(examples)
    return default_collate(examples)


class Positions(Protocol):
    """What has an example at every position of a run."""

    def __len__(self) -> int:
        """Return how many examples an epoch has."""

    def at(self, g: int) -> tuple[Stream, int]:
        """Return the stream that position g is of, and the position in it."""

    def __getitem__(self, g: int) -> dict[str, Any]:
        """Return the example at position g."""

    def batch(self, positions: list[int]) -> Batch:
        """Return the collated examples at positions."""


def check_same_size(parts: Iterable[Mapping[str, Any]]) -> None:
    """Raise a `UserError` if examples or batches of one forward pass differ in height or width."""
    parts = list(parts)
    for key, axes in {"image": slice(-3, -1), "moments": slice(-2, None)}.items():
        sizes = sorted({tuple(part[key].shape[axes]) for part in parts if key in part})
        if len(sizes) > 1:
            what = "images" if key == "image" else "cached latents"
            raise UserError(
                f"{what} of different sizes {sizes} cannot share a step; set 'size' in the data"
            )


class Examples(Dataset):
    """Positions to batches: of the subject alone, or `(subject, prior)` when there is a prior."""

    def __init__(self, subject: Positions, prior: Positions | None = None):
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, g: int) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        return self.subject[g] if self.prior is None else (self.subject[g], self.prior[g])

    def __getitems__(self, positions: list[int]) -> Batch | tuple[Batch, Batch] | UserError:
        """Return a batch, or the error in it, which a worker that raised it would bury in a
        traceback.
        """
        try:
            subject = self.subject.batch(positions)
            if self.prior is None:
                return subject
            prior = self.prior.batch(positions)
            check_same_size([subject, prior])
            return subject, prior
        except UserError as error:
            return error


class PositionBatches(Sampler[list[int]]):
    """An epoch's batches of positions for one rank, from batch number `start()` of the run on.

    `start` is read anew by each `iter`, so an epoch continues where the run stands. The loop that
    consumes the batches decides when an epoch that was resumed in its middle is over.
    """

    def __init__(
        self,
        batch_size: int,
        batches: int,
        start: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.batch_size, self.batches, self.start = batch_size, batches, start
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        for number in range(first, first + self.batches):
            g = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(g, g + self.batch_size))


class ExamplesLoader(DataLoader):
    """A DataLoader over `Examples` that raises the errors its workers return."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                # Not `raise batch`: that makes this frame a cycle, and workers found by the garbage
                # collector take five seconds each to stop.
                raise UserError(str(batch))
            yield batch


class TrainLoader(ExamplesLoader):
    """The training batches. Lightning saves its state: what positions depend on but do not hold."""

    batch_sampler: PositionBatches

    def state_dict(self) -> dict[str, int]:
        """Return how many examples a step takes, over all ranks."""
        sampler = self.batch_sampler
        return {"global_batch": sampler.batch_size * sampler.world_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Warn if the run takes another number of examples a step than before."""
        saved, now = state.get("global_batch"), self.state_dict()["global_batch"]
        if saved != now:
            log.warning(
                "resumed with %s examples a step instead of %s: their order is another one",
                now,
                saved,
            )
