"""Subject and class images as batches in which every random choice is a function of the seed and a position.

The position g of a training example counts the examples that the whole run, over all ranks, consumes before
it. Which image g is, how it is augmented and the seed of its noise are hashes of (seed, g). So the examples
do not depend on the batch size, the ranks, the workers or on where a run was stopped and resumed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ldm.data.image_folder import list_images
from ldm.data.latents import check_encodable
from ldm.data.prompts import captions_from_templates
from ldm.errors import ParameterError, UserError, nearest, under
from ldm.rng import derive_seed, generator
from ldm.util import check_params, get_obj_from_str, instantiate_from_config

log = logging.getLogger(__name__)

CHECK_UP_TO = 64  # images of a folder that are decoded before training starts

CLASS_IMAGE_KEYS = ("batch_size", "steps", "scale", "unconditional")  # how class images are made

# image (b, h, w, c) in [-1, 1], caption list[str], noise_seed (b,) int64; with masks, mask (b, h, w) in [0, 1]
Batch = dict[str, Any]


class Stream:
    """An endless sequence of a dataset's examples, each a function of `(seed, role, g)`.

    With `shuffle`, every pass over the images has its own order; otherwise example g is item g.
    """

    def __init__(self, dataset: Dataset, seed: int, role: str, shuffle: bool = True):
        self.dataset, self.seed, self.role, self.shuffle = dataset, seed, role, shuffle
        # A dataset that repeats its images is permuted image by image, so that none comes twice before
        # all came once.
        self.n_images: int = getattr(dataset, "n_images", None) or len(dataset)  # type: ignore[arg-type]
        self._pass, self._order = -1, torch.empty(0)

    def index(self, g: int) -> int:
        """Which item of the dataset stands at position g."""
        if not self.shuffle:
            return g
        number, place = divmod(g, self.n_images)
        if number != self._pass:
            keys = (self.seed, "order", self.role, number)
            self._pass, self._order = number, torch.randperm(self.n_images, generator=generator(*keys))
        return int(self._order[place])

    def __getitem__(self, g: int) -> dict[str, Any]:
        example = self._augmented(self.index(g), (self.seed, "augment", self.role, g))
        return {**example, "noise_seed": derive_seed(self.seed, "noise", self.role, g)}

    def _augmented(self, index: int, keys: tuple[int | str, ...]) -> dict[str, Any]:
        if hasattr(self.dataset, "example"):
            return self.dataset.example(index, generator(*keys))
        with torch.random.fork_rng(devices=[]):  # another's dataset draws from torch's global generator
            torch.manual_seed(derive_seed(*keys))
            return self.dataset[index]

    def batch(self, positions: list[int]) -> Batch:
        """The collated examples at `positions`."""
        examples = [self[g] for g in positions]
        check_same_size(examples)
        return default_collate(examples)


def check_same_size(parts: Iterable[Mapping[str, Any]]) -> None:
    """Raise a `UserError` if examples or batches that one forward pass takes differ in height or width."""
    parts = list(parts)
    for key, axes in {"image": slice(-3, -1), "moments": slice(-2, None)}.items():
        sizes = sorted({tuple(part[key].shape[axes]) for part in parts if key in part})
        if len(sizes) > 1:
            what = "images" if key == "image" else "cached latents"
            raise UserError(f"{what} of different sizes {sizes} cannot share a step; set 'size' in the data")


class Examples(Dataset):
    """Positions to batches: of the subject alone, or `(subject, prior)` when there is a prior."""

    def __init__(self, subject: Stream, prior: Stream | None = None):
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return len(self.subject.dataset)  # type: ignore[arg-type]

    def __getitem__(self, g: int) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        return self.subject[g] if self.prior is None else (self.subject[g], self.prior[g])

    def __getitems__(self, positions: list[int]) -> Batch | tuple[Batch, Batch] | UserError:
        """What a DataLoader calls; an error is returned, because a worker would bury it in its traceback."""
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

    `start` is read anew by each `iter`, so an epoch continues where the run stands. The loop that consumes
    the batches decides when an epoch that was resumed in its middle is over.
    """

    def __init__(self, batch_size: int, batches: int, start: Callable[[], int], rank: int = 0, world_size: int = 1):
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
                # Not `raise batch`: that makes this frame a cycle, and workers found by the garbage collector
                # take five seconds each to stop.
                raise UserError(str(batch))
            yield batch


class TrainLoader(ExamplesLoader):
    """The training batches. Its state, which Lightning saves, is what the positions depend on but do not hold."""

    batch_sampler: PositionBatches

    def state_dict(self) -> dict[str, int]:
        return {"global_batch": self.batch_sampler.batch_size * self.batch_sampler.world_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        saved, now = state.get("global_batch"), self.state_dict()["global_batch"]
        if saved != now:
            log.warning("resumed with %s examples a step instead of %s: their order is another one", now, saved)


def _as_is(batch: Any) -> Any:
    return batch


class DataModuleFromConfig(pl.LightningDataModule):
    """Datasets from configs, as batches of the subject or as pairs `(subject, prior)` when `reg` is given.

    A batch is `{"image": (b, h, w, c) in [-1, 1], "caption": list[str], "noise_seed": (b,) int64}`; both
    halves of a pair have `batch_size` examples. With `num_class_images`, class images that `reg`'s folder
    lacks are to be made before the training starts; `class_images` says how (`batch_size`, `steps`, `scale`,
    `unconditional`, see `make_class_images`).

    With `latent_cache` the first stage encodes each image and its mirror once, when the training starts, and a batch
    has "moments" (b, 2 z, h, w) of the posteriors instead of images: the numbers stay those of an uncached run. `true`
    keeps them in memory; a folder keeps them for later runs, too. Workers have nothing to do then: there are none.

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
        for key, value in (("batch_size", batch_size - 1), ("num_workers", num_workers or 0)):
            if value < 0:
                raise ParameterError(key, f"expected {'at least 1' if key == 'batch_size' else '0 or more'}")
        if num_class_images < 0:
            raise ParameterError("num_class_images", f"expected 0 or more, got {num_class_images}")
        if num_class_images and reg is None:
            raise ParameterError("num_class_images", "needs data.params.reg, which says where they go")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.reg, self.num_class_images = reg, num_class_images
        self.latent_cache = latent_cache
        self.class_images = dict(class_images or {})
        if unknown := sorted(set(self.class_images) - set(CLASS_IMAGE_KEYS)):
            hint = nearest(unknown[0], list(CLASS_IMAGE_KEYS))
            accepted = ", ".join(CLASS_IMAGE_KEYS)
            raise ParameterError(f"class_images.{unknown[0]}", f"unknown key{hint}; accepted: {accepted}")
        if not 0 <= (share := self.class_images.get("unconditional", 0)) < 1:
            raise ParameterError("class_images.unconditional", f"expected a share below 1, got {share}")
        configs = {"train": train, "reg": reg, "validation": validation, "test": test}
        self.datasets: dict[str, Any] = {
            name: instantiate_from_config(config, where=name)
            for name, config in configs.items()
            if config is not None and not (name == "reg" and num_class_images)
        }
        for name, loader in (("validation", "val_dataloader"), ("test", "test_dataloader")):
            if name not in self.datasets:  # not overridden in Lightning's eyes, which then runs no such loop
                setattr(self, loader, getattr(super(), loader))
        sizes = {name: ((config or {}).get("params") or {}).get("size") for name, config in configs.items()}
        if train and reg and sizes["train"] != sizes["reg"]:
            raise UserError(
                f"data.params: train.params.size is {sizes['train']}, reg.params.size {sizes['reg']}: "
                "subject and class images share a batch and need one size"
            )
        if num_class_images:  # the folder may still be empty; all else can be checked now
            self._check_reg()
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
        """The captions of class images that have no caption file."""
        accepted = signature(captions_from_templates).parameters
        return captions_from_templates(**{k: v for k, v in self._reg_params.items() if k in accepted})

    @property
    def class_folder(self) -> Path:
        """The folder of the class images."""
        return Path(self._reg_params["data_root"]).expanduser()

    @property
    def class_size(self) -> int:
        """The side of a class image, pixels."""
        return int(self._reg_params["size"])

    @property
    def class_images_to_make(self) -> int:
        """How many images the class folder lacks."""
        if not self.num_class_images:
            return 0
        return max(0, self.num_class_images - len(list_images(self._reg_params["data_root"])))

    def _check_reg(self) -> None:
        assert self.reg is not None
        cls = get_obj_from_str(str(self.reg.get("target")), "reg.target")
        check_params(cls, self._reg_params, "reg.params")
        root = self._reg_params.get("data_root")
        if not root:
            raise ParameterError("reg", "no folder for the class images; give --reg_data_root FOLDER")
        if Path(root).expanduser().is_file():
            raise UserError(f"{root}: is a file; --reg_data_root names the folder of the class images")
        if self.class_images_to_make and not self._reg_params.get("size"):
            raise ParameterError("reg.params.size", "needed to make class images")
        with under("reg.params"):
            self.class_prompts  # noqa: B018 (raises what is wrong with the templates)

    def setup(self, stage: str | None = None) -> None:
        """Open the class images, which may have been made since, and `check`."""
        if self.num_class_images and "reg" not in self.datasets and stage in (None, "fit"):
            assert self.reg is not None
            self.datasets["reg"] = instantiate_from_config(self.reg, where="data.params.reg")
        for dataset in self.datasets.values():
            if hasattr(dataset, "open"):
                dataset.open()
        self.check()

    def check(self) -> None:
        """Decode every image of small sets once, so that a broken file shows before the training.

        Raises:
            UserError: an image does not decode.
        """
        for dataset in self.datasets.values():
            if hasattr(dataset, "check") and dataset.n_images <= CHECK_UP_TO:
                dataset.check()

    def summary(self) -> dict[str, Any]:
        """What a run trains on: `subject_images`, `class_images`, `class_images_to_make`, and the distinct
        `subject_prompts` and `class_prompts`."""
        train, reg = self.datasets.get("train"), self.datasets.get("reg")
        existing = len(list_images(self._reg_params["data_root"])) if self.num_class_images else 0
        return {
            "subject_images": getattr(train, "n_images", 0),
            "class_images": existing if reg is None else getattr(reg, "n_images", len(reg)),
            "class_images_to_make": self.class_images_to_make,
            "subject_prompts": getattr(train, "prompts", []),
            "class_prompts": getattr(reg, "prompts", []) if self.reg is None or reg else self.class_prompts,
        }

    # loaders

    def train_dataloader(self) -> TrainLoader:
        if "train" not in self.datasets:
            raise UserError("data.params.train: needed to train")
        subject = Stream(self.datasets["train"], self.seed, "subject")
        prior = Stream(self.datasets["reg"], self.seed, "prior") if "reg" in self.datasets else None
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = max(1, len(self.datasets["train"]) // (self.batch_size * world_size))
        sampler = PositionBatches(self.batch_size, batches, self._batches_done, rank, world_size)
        return TrainLoader(Examples(subject, prior), batch_sampler=sampler, **self._loader_options())

    def _batches_done(self) -> int:
        # Not global_step x accumulate_grad_batches: the last step of an epoch may accumulate fewer. Lightning
        # saves this counter and restores it before it asks for the loader, but does not skip batches itself.
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def val_dataloader(self) -> ExamplesLoader:
        return self._in_order("validation", "val")

    def test_dataloader(self) -> ExamplesLoader:
        return self._in_order("test", "test")

    def _in_order(self, name: str, role: str) -> ExamplesLoader:
        """All examples of a set, the same on every rank and in every epoch, so that their losses compare."""
        examples = Examples(Stream(self.datasets[name], self.seed, role, shuffle=False))
        return ExamplesLoader(examples, batch_size=self.batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        workers = 0 if self.latent_cache else self.num_workers
        if workers is None:  # what the cache holds needs no help; decoding does
            in_memory = all(getattr(dataset, "in_memory", False) for dataset in self.datasets.values())
            workers = 0 if in_memory else min(4, os.cpu_count() or 1)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,  # workers that end with an epoch lose their decoded images
            "collate_fn": _as_is,
            "generator": torch.Generator(),  # else each epoch draws from the global one
        }
