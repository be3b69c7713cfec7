"""Datasets from configs, as the batches of a training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data import overlap
from ldm.data.finding import list_images
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.latents import CachedLatents, check_encodable
from ldm.data.personalized import PersonalizedBase
from ldm.data.prompts import captions_from_templates
from ldm.data.streams import (
    Examples,
    ExamplesLoader,
    PositionBatches,
    Stream,
    TrainLoader,
    count_images,
)
from ldm.errors import ParameterError, UserError, check_counts, nearest, under
from ldm.util import check_params, get_obj_from_str, instantiate_from_config

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


def _as_is(batch: Any) -> Any:
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
    ):
        super().__init__()
        self.prepare_data_per_node = False  # all machines see the same folders
        if batch_size < 1:
            raise ParameterError("batch_size", "expected at least 1")
        if (num_workers or 0) < 0:
            raise ParameterError("num_workers", "expected 0 or more")
        if num_class_images < 0:
            raise ParameterError("num_class_images", f"expected 0 or more, got {num_class_images}")
        if seed < 0:
            raise ParameterError("seed", f"expected 0 or more, got {seed}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.reg, self.num_class_images = reg, num_class_images
        self.latent_cache = latent_cache
        self.class_images = dict(class_images or {})
        configs = {"train": train, "reg": reg, "validation": validation, "test": test}

        # What the configs say is checked first, since opening a dataset reads folders.
        self._check_class_images()
        _check_sizes(train, reg)

        # Class images that are still to be made cannot be opened. Those that are there already are
        # opened nevertheless, to be checked.
        self.datasets: dict[str, Any] = {
            name: instantiate_from_config(config, where=name)
            for name, config in configs.items()
            if config is not None and (name != "reg" or self.class_images_to_make == 0)
        }
        self._unfinished = self._open_unfinished()
        self._check_folders()
        for name, loader in (("validation", "val_dataloader"), ("test", "test_dataloader")):
            if name not in self.datasets:
                # A method that is not overridden, to Lightning, which then runs no such loop.
                setattr(self, loader, getattr(super(), loader))
        if latent_cache:
            for name in ("train", "reg"):
                if name in self.datasets:
                    check_encodable(self.datasets[name], name)

    # class images

    @property
    def _reg_params(self) -> dict[str, Any]:
        return dict((self.reg or {}).get("params") or {})

    @property
    def class_prompts(self) -> list[str]:
        """Return the captions of class images that have no caption file."""
        accepted = signature(captions_from_templates).parameters
        given = {key: value for key, value in self._reg_params.items() if key in accepted}
        return captions_from_templates(**given)

    @property
    def class_folder(self) -> Path:
        """Return the folder of the class images."""
        return Path(self._reg_params["data_root"]).expanduser()

    @property
    def class_size(self) -> int:
        """Return the side of a class image, pixels."""
        return int(self._reg_params["size"])

    @property
    def class_images_to_make(self) -> int:
        """Return how many images the class folder lacks."""
        if not self.num_class_images:
            return 0
        return max(0, self.num_class_images - len(list_images(self.class_folder)))

    @property
    def prior(self) -> Any:
        """Return the dataset of the class images that there are; None if there are none."""
        return self.datasets.get("reg", self._unfinished)

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
        if not self.num_class_images:
            return
        if self.reg is None:
            raise ParameterError(
                "num_class_images", "needs data.params.reg, which says where they go"
            )
        cls = get_obj_from_str(str(self.reg.get("target")), "reg.target")
        check_params(cls, self._reg_params, "reg.params")
        root = self._reg_params.get("data_root")
        if not root:
            raise ParameterError(
                "reg", "no folder for the class images; give --reg_data_root FOLDER"
            )
        if Path(root).expanduser().is_file():
            raise UserError(
                f"{root}: is a file; --reg_data_root names the folder of the class images"
            )
        if self.class_images_to_make and not self._reg_params.get("size"):
            raise ParameterError("reg.params.size", "needed to make class images")
        with under("reg.params"):
            self.class_prompts  # noqa: B018 (raises what is wrong with the templates)

    def _open_unfinished(self) -> Any:
        """Open the class images of a folder that lacks some; None if it has none or lacks none."""
        if self.reg is None or not self.class_images_to_make or not list_images(self.class_folder):
            return None
        return instantiate_from_config(self.reg, where="reg")

    def _check_folders(self) -> None:
        """Raise a `UserError` if subject and class images are in each other's folders."""
        subject, root = self.datasets.get("train"), self._reg_params.get("data_root")
        if isinstance(subject, ImageFolderDataset) and root:
            overlap.check_folders(subject.root, root)
            if isinstance(self.prior, ImageFolderDataset):
                overlap.check_files(subject.paths, self.prior.paths)

    # what Lightning and the training call

    def setup(self, stage: str | None = None) -> None:
        """Open the class images, which may have been made since, and `check`."""
        if self.reg is not None and "reg" not in self.datasets and stage in (None, "fit"):
            self.datasets["reg"] = instantiate_from_config(self.reg, where="data.params.reg")
            self._unfinished = None
        for dataset in self.datasets.values():
            if isinstance(dataset, CachedLatents):
                dataset.open()
        self.check()

    def check(self) -> None:
        """Decode every image, so that a broken file shows before the training.

        Raises:
            UserError: an image does not decode.
        """
        for dataset in (*self.datasets.values(), self._unfinished):
            if isinstance(dataset, ImageFolderDataset):
                dataset.check()
        subject, prior = self.datasets.get("train"), self.prior
        if isinstance(subject, ImageFolderDataset) and isinstance(prior, ImageFolderDataset):
            overlap.warn_of_copies(subject.check(), prior.check())

    def summary(self) -> dict[str, Any]:
        """Say what a run trains on.

        It has `subject_images`, `class_images`, `class_images_to_make`, the distinct
        `subject_prompts` and `class_prompts`, and of the subject's those without its identifier,
        `unnamed_prompts`.
        """
        train, reg = self.datasets.get("train"), self.datasets.get("reg")
        made_later = self.reg is not None and reg is None
        return {
            "subject_images": 0 if train is None else count_images(train),
            "class_images": 0 if self.prior is None else count_images(self.prior),
            "class_images_to_make": self.class_images_to_make,
            "subject_prompts": _prompts(train),
            "unnamed_prompts": train.unnamed if isinstance(train, PersonalizedBase) else [],
            "class_prompts": self.class_prompts if made_later else _prompts(reg),
        }

    # loaders

    def train_dataloader(self) -> TrainLoader:
        if "train" not in self.datasets:
            raise UserError("data.params.train: needed to train")
        subject = Stream(self.datasets["train"], self.seed, "subject")
        prior = Stream(self.datasets["reg"], self.seed, "prior") if "reg" in self.datasets else None
        world_size, rank = 1, 0
        if self.trainer:
            world_size, rank = self.trainer.world_size, self.trainer.global_rank
        batches = max(1, len(self.datasets["train"]) // (self.batch_size * world_size))
        sampler = PositionBatches(self.batch_size, batches, self._batches_done, rank, world_size)
        examples = Examples(subject, prior)
        return TrainLoader(examples, batch_sampler=sampler, **self._loader_options())

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
            workers = (
                0 if all(map(_in_memory, self.datasets.values())) else min(4, os.cpu_count() or 1)
            )
        return {
            "num_workers": workers,
            # Workers that end with an epoch lose their decoded images.
            "persistent_workers": workers > 0,
            "collate_fn": _as_is,
            # Without one of its own, a loader draws from the global generator in each epoch.
            "generator": torch.Generator(),
        }


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


def _prompts(dataset: Any) -> list[str]:
    return dataset.prompts if isinstance(dataset, PersonalizedBase) else []


def _in_memory(dataset: Any) -> bool:
    return isinstance(dataset, ImageFolderDataset) and dataset.in_memory
