"""Datasets from configs, as the batches of a training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations, product
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data import overlap
from ldm.data.concepts import read_concepts
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.latents import CachedLatents, check_encodable
from ldm.data.streams import Examples, ExamplesLoader, PositionBatches, Stream, TrainLoader
from ldm.data.turns import StreamsInTurn, Together, Turns
from ldm.errors import ParameterError, UserError, check_counts, nearest, under
from ldm.util import instantiate_from_config

# How class images are made.
CLASS_IMAGE_KEYS = (
    "batch_size",
    "steps",
    "scale",
    "sampler",
    "schedule",
    "eta",
    "unconditional",
)


def _as_is(batch: object) -> Any:
    return batch


class DataModuleFromConfig(pl.LightningDataModule):
    """Datasets as batches of the subject, or as pairs `(subject, prior)` when `reg` is given.

    A batch is `{"image": (b, h, w, c) in [-1, 1], "caption": list[str], "noise_seed": (b,) int64}`;
    both of a pair have `batch_size` examples. With `num_class_images`, class images that `reg`'s
    folder lacks are to be made before the training starts; `class_images` says how (see
    `CLASS_IMAGE_KEYS` and `make_class_images`).

    With `latent_cache` the first stage encodes each image and its mirror once, when the training
    starts, and a batch has "moments" (b, 2 z, h, w) of the posteriors instead of images: the
    numbers stay those of an uncached run. `true` keeps them in memory; a folder keeps them for
    later runs, too. Workers have nothing to do then: there are none.

    With `concepts` there are several subjects, each with the keys of `ConceptOptions`; `train`,
    `reg` and `validation` say what they share. They have their turns by their weights, mixed as
    evenly as possible, or `turn` examples of weight 1 after another. The prior's examples are of
    the same subject's class.

    Raises:
        UserError: a config that does not fit its target, or what the datasets raise.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        reg: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        num_workers: int | None = None,
        seed: int = 23,
        num_class_images: int = 0,
        class_images: Mapping[str, Any] | None = None,
        latent_cache: bool | str | None = None,
        concepts: Sequence[Mapping[str, Any]] | None = None,
        turn: int | None = None,
    ):
        super().__init__()
        self.prepare_data_per_node = False  # all machines see the same folders
        _check_numbers(batch_size, num_workers, num_class_images, seed)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.reg, self.num_class_images = reg, num_class_images
        self.latent_cache = latent_cache
        self.class_images = dict(class_images or {})
        configs = {"train": train, "reg": reg, "validation": validation}
        if turn is not None and concepts is None:
            raise ParameterError(
                "turn", "says how concepts take turns, and there is one: leave it out"
            )

        # What the configs say is checked first, since opening a dataset reads folders. One subject
        # is a list of one.
        self.concepts = read_concepts(concepts, configs, num_class_images)
        self.turns = Turns([concept.weight for concept in self.concepts], turn)
        self._check_class_images()
        _check_sizes(train, reg)

        for concept in self.concepts:
            concept.open()
        self._test = None if test is None else instantiate_from_config(test, where="test")
        # Photos of one subject among the class images of another would be taught as both.
        for first, second in permutations(self.concepts, 2):
            first.check_folders(second)
        for name, loader in (("validation", "val_dataloader"), ("test", "test_dataloader")):
            if name not in self.datasets:
                # A method that is not overridden, to Lightning, which then runs no such loop.
                setattr(self, loader, getattr(super(), loader))
        if latent_cache:
            for name in ("train", "reg"):
                for dataset in self.each(name):
                    check_encodable(dataset, name)

    # The datasets

    @property
    def datasets(self) -> dict[str, Any]:
        """Return the datasets by their names in the config, those of all subjects as one."""
        found = {}
        for name in ("train", "reg", "validation"):
            parts = self.each(name)
            # Class images count when every subject has its own.
            if parts and len(parts) == len(self.concepts):
                found[name] = parts[0] if len(parts) == 1 else Together(parts)
        return found if self._test is None else {**found, "test": self._test}

    def each(self, name: str) -> list[Any]:
        """Return the dataset of each subject that has it."""
        own = [concept.datasets for concept in self.concepts]
        return [datasets[name] for datasets in own if name in datasets]

    # class images

    @property
    def class_images_to_make(self) -> int:
        """Return how many images the class folders lack."""
        if not self.num_class_images:
            return 0
        # Subjects of one class may share a folder.
        lacking = {c.class_folder: c.class_images_to_make for c in self.concepts if c.reg}
        return sum(lacking.values())

    def _check_class_images(self) -> None:
        """Raise a `UserError` if class images could not be made as the config says."""
        unknown = sorted(set(self.class_images) - set(CLASS_IMAGE_KEYS))
        if unknown:
            hint = nearest(unknown[0], list(CLASS_IMAGE_KEYS))
            accepted = ", ".join(CLASS_IMAGE_KEYS)
            raise ParameterError(
                f"class_images.{unknown[0]}", f"unknown key{hint}; accepted: {accepted}"
            )
        share = self.class_images.get("unconditional", 0)
        if not 0 <= share < 1:
            raise ParameterError(
                "class_images.unconditional", f"expected a share below 1, got {share}"
            )
        with under("class_images"):
            check_counts(
                batch_size=self.class_images.get("batch_size", 1),
                steps=self.class_images.get("steps", 1),
            )
        scale = self.class_images.get("scale", 1)
        if not math.isfinite(scale):
            raise ParameterError("class_images.scale", f"expected a number, got {scale}")
        for concept in self.concepts:
            concept.check_class_images()

    # what Lightning and the training call

    def setup(self, stage: str | None = None) -> None:
        """Open the class images, which may have been made since, and `check`."""
        if stage in (None, "fit"):
            for concept in self.concepts:
                concept.open_class_images()
        for dataset in self.datasets.values():
            if isinstance(dataset, CachedLatents):
                dataset.open()
        self.check()

    def check(self) -> None:
        """Decode every image, so that a broken file shows before the training.

        Raises:
            UserError: an image does not decode.
        """
        opened = [dataset for concept in self.concepts for dataset in concept.opened()]
        for dataset in (*opened, self._test):
            if isinstance(dataset, ImageFolderDataset):
                dataset.check()
        subjects = [found for found in self.each("train") if isinstance(found, ImageFolderDataset)]
        priors = [concept.prior for concept in self.concepts]
        for subject, prior in product(subjects, priors):
            if isinstance(prior, ImageFolderDataset):
                overlap.warn_of_copies(subject.check(), prior.check())
        for subject, other in combinations(subjects, 2):
            overlap.warn_of_copies(subject.check(), other.check(), "as two subjects")

    def summary(self) -> dict[str, Any]:
        """Say what a run trains on.

        It has `subject_images`, `class_images`, `class_images_to_make`, the distinct
        `subject_prompts` and `class_prompts`, and of the subject's those without its identifier,
        `unnamed_prompts`; of several subjects all together, and as `concepts` of each.
        """
        each = [concept.summary() for concept in self.concepts]
        found: dict[str, Any] = {}
        for key, first in each[0].items():
            values = [summary[key] for summary in each]
            if isinstance(first, list):
                found[key] = list(dict.fromkeys(text for texts in values for text in texts))
            else:
                found[key] = sum(values)
        found["class_images_to_make"] = self.class_images_to_make
        return {**found, "concepts": each} if len(each) > 1 else found

    # loaders

    def train_dataloader(self) -> TrainLoader:
        if "train" not in self.datasets:
            raise UserError("data.params.train: needed to train")
        subject = self._in_turn("train", "subject")
        prior = self._in_turn("reg", "prior") if "reg" in self.datasets else None
        world_size, rank = 1, 0
        if self.trainer:
            world_size, rank = self.trainer.world_size, self.trainer.global_rank
        batches = max(1, len(self.datasets["train"]) // (self.batch_size * world_size))
        sampler = PositionBatches(self.batch_size, batches, self._batches_done, rank, world_size)
        examples = Examples(subject, prior)
        return TrainLoader(examples, batch_sampler=sampler, **self._loader_options())

    def _in_turn(self, name: str, role: str) -> StreamsInTurn:
        # The first subject's random numbers are those that it has alone.
        streams = [
            Stream(dataset, self.seed, f"{role} {number}" if number else role)
            for number, dataset in enumerate(self.each(name))
        ]
        return StreamsInTurn(streams, self.turns)

    def _batches_done(self) -> int:
        # Not global_step x accumulate_grad_batches: the last step of an epoch may accumulate fewer.
        # Lightning saves this counter and restores it before it asks for the loader, but does not
        # skip batches itself.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed

    def val_dataloader(self) -> ExamplesLoader:
        return self._in_order("validation", "val")

    def test_dataloader(self) -> ExamplesLoader:
        return self._in_order("test", "test")

    def _in_order(self, name: str, role: str) -> ExamplesLoader:
        """Return all examples of a set, the same on every rank and in every epoch."""
        examples = Examples(Stream(self.datasets[name], self.seed, role, shuffle=False))
        return ExamplesLoader(examples, batch_size=self.batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        workers = 0 if self.latent_cache else self.num_workers
        if workers is None:  # what the cache holds needs no help; decoding does
            opened = [dataset for concept in self.concepts for dataset in concept.opened()]
            workers = 0 if all(map(_in_memory, opened)) else min(4, os.cpu_count() or 1)
        return {
            "num_workers": workers,
            # Workers that end with an epoch lose their decoded images.
            "persistent_workers": workers > 0,
            "collate_fn": _as_is,
            # Without one of its own, a loader draws from the global generator in each epoch.
            "generator": torch.Generator(),
        }


def _check_numbers(
    batch_size: int, num_workers: int | None, num_class_images: int, seed: int
) -> None:
    """Raise a `UserError` for the first number that is out of its range."""
    if batch_size < 1:
        raise ParameterError("batch_size", "expected at least 1")
    if (num_workers or 0) < 0:
        raise ParameterError("num_workers", "expected 0 or more")
    if num_class_images < 0:
        raise ParameterError("num_class_images", f"expected 0 or more, got {num_class_images}")
    if seed < 0:
        raise ParameterError("seed", f"expected 0 or more, got {seed}")


def _check_sizes(train: Mapping[str, Any] | None, reg: Mapping[str, Any] | None) -> None:
    """Raise a `UserError` if subject and class images cannot share a batch."""
    if not train or not reg:
        return
    sizes = [(config.get("params") or {}).get("size") for config in (train, reg)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"data.params: train.params.size is {sizes[0]}, reg.params.size {sizes[1]}: "
            "subject and class images share a batch and need one size"
        )


def _in_memory(dataset: object) -> bool:
    return isinstance(dataset, ImageFolderDataset) and dataset.in_memory
