"""A subject as a run has it: its photos, the images of its class, and how often it has its turn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ldm.config import IDENTIFIER
from ldm.data import overlap
from ldm.data.finding import is_searched, list_images
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.notices import warn_once
from ldm.data.personalized import PersonalizedBase
from ldm.data.prompts import captions_from_templates
from ldm.data.streams import count_images
from ldm.errors import ParameterError, UserError, under
from ldm.util import check_mapping, check_params, get_obj_from_str, instantiate_from_config

NAME = "concepts"  # the parameter of `DataModuleFromConfig`
Configs = Mapping[str, Mapping[str, Any] | None]  # train, reg and validation


@dataclass(frozen=True)
class ConceptOptions:
    """What a config says of one of several subjects. The rest is in `train`, `reg`, `validation`.

    Args:
        data_root: the folder of its photos.
        class_word: the noun of its class.
        identifier: the rare word that names it, which no other subject has; by default that of
            `train`.
        reg_data_root: the folder of its class images, where there are any.
        weight: how often it has its turn, beside the others; two decimals.
        templates, class_templates: of its captions and of its class images'.
    """

    data_root: str
    class_word: str
    identifier: str = IDENTIFIER
    reg_data_root: str | None = None
    weight: float = 1.0
    templates: Any = None
    class_templates: Any = None

    def of(self, configs: Configs) -> dict[str, Mapping[str, Any] | None]:
        """Return the datasets' configs with this subject's folders and words in them."""
        photos = {
            "data_root": self.data_root,
            "identifier": self.identifier,
            "templates": self.templates,
        }
        own: dict[str, dict[str, Any]] = {
            "train": photos,
            "validation": photos,
            "reg": {"data_root": self.reg_data_root, "templates": self.class_templates},
        }
        found: dict[str, Mapping[str, Any] | None] = {}
        for name, config in configs.items():
            if config is None:
                found[name] = None
                continue
            given = {key: value for key, value in own[name].items() if value is not None}
            params = {**(config.get("params") or {}), **given, "placeholder_token": self.class_word}
            found[name] = {**deepcopy(dict(config)), "params": params}
        return found


class Concept:
    """One subject: its datasets, and what its folder of class images still lacks.

    Args:
        configs: of `train`, `reg` and `validation`; None for what there is not.
        num_class_images: how many class images its folder is to have.
        weight: how often it has its turn, beside other subjects.
        where: its path in the YAML, for errors; empty for a single subject.

    Raises:
        UserError: a config that does not fit its target, or what the datasets raise.
    """

    def __init__(
        self, configs: Configs, num_class_images: int = 0, weight: float = 1.0, where: str = ""
    ):
        self.configs, self.weight, self.where = configs, weight, where
        self.num_class_images = num_class_images
        self.reg = configs.get("reg")
        self.datasets: dict[str, Any] = {}
        self._unfinished: Any = None

    def open(self) -> None:
        """Open the datasets, and compare the folders of subject and class."""
        # Class images that are still to be made cannot be opened. Those that are there already are
        # opened nevertheless, to be checked.
        for name, config in self.configs.items():
            if config is not None and (name != "reg" or self.class_images_to_make == 0):
                self.datasets[name] = instantiate_from_config(config, where=self._path(name))
        if self.reg is not None and self.class_images_to_make and list_images(self.class_folder):
            # Of the images that lack, `num_images` may count some. It is checked when all are made.
            params = {k: v for k, v in self._reg_params.items() if k != "num_images"}
            there = {**self.reg, "params": params}
            self._unfinished = instantiate_from_config(there, where=self._path("reg"))
        self.check_folders(self)

    def open_class_images(self) -> None:
        """Open the class images, which may have been made since."""
        if self.reg is not None and "reg" not in self.datasets:
            where = f"data.params.{self._path('reg')}"
            self.datasets["reg"] = instantiate_from_config(self.reg, where=where)
            self._unfinished = None

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    @property
    def folder(self) -> str:
        """Return the folder of its photos."""
        return str(((self.configs.get("train") or {}).get("params") or {}).get("data_root"))

    # The class

    @property
    def _reg_params(self) -> dict[str, Any]:
        return dict((self.reg or {}).get("params") or {})

    @property
    def class_prompts(self) -> list[str]:
        """Return the captions of class images that have no caption file."""
        accepted = inspect.signature(captions_from_templates).parameters
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

    def check_class_images(self) -> None:
        """Raise a `UserError` if class images could not be made as the config says."""
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
            flag = "reg_data_root in each concept" if self.where else "--reg_data_root FOLDER"
            raise ParameterError(self._path("reg"), f"no folder for the class images; give {flag}")
        if Path(root).expanduser().is_file():
            raise UserError(
                f"{root}: is a file; --reg_data_root names the folder of the class images"
            )
        if self.class_images_to_make and not self._reg_params.get("size"):
            raise ParameterError("reg.params.size", "needed to make class images")
        # Not only when the images are made, which may take hours.
        wanted = self._reg_params.get("num_images")
        if self.class_images_to_make and isinstance(wanted, int) and wanted > self.num_class_images:
            raise ParameterError(
                "reg.params.num_images",
                f"{wanted} of the {self.num_class_images} that num_class_images makes: raise "
                "num_class_images, or lower num_images",
            )
        with under("reg.params"):
            self.class_prompts  # noqa: B018 (raises what is wrong with the templates)

    # What is in the folders

    def check_folders(self, of_class: Concept) -> None:
        """Raise a `UserError` if this subject's images and another's class images share folders."""
        subject, root = self.datasets.get("train"), of_class._reg_params.get("data_root")
        if isinstance(subject, ImageFolderDataset) and root:
            overlap.check_folders(subject.root, root)
            if isinstance(of_class.prior, ImageFolderDataset):
                overlap.check_files(subject.paths, of_class.prior.paths)

    def opened(self) -> list[Any]:
        """Return the datasets, and what there is of class images that are not complete."""
        return [*self.datasets.values(), *([] if self._unfinished is None else [self._unfinished])]

    def summary(self) -> dict[str, Any]:
        """Say what a run trains on of this subject, see `DataModuleFromConfig.summary`."""
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


def _prompts(dataset: object) -> list[str]:
    return dataset.prompts if isinstance(dataset, PersonalizedBase) else []


def read_concepts(
    given: Sequence[Mapping[str, object]] | None, configs: Configs, num_class_images: int
) -> list[Concept]:
    """Return a run's subjects: those of the list, or without one that of the configs.

    Raises:
        UserError: a list that is none, an unknown key, or subjects that would be taken for each
            other.
    """
    if given is None:
        return [Concept(configs, num_class_images)]
    if not isinstance(given, (list, tuple)) or not given:
        raise ParameterError(NAME, f"expected a list of subjects, got {given!r}")
    # Who names none has that of `train`, which at most one may have.
    shared = ((configs.get("train") or {}).get("params") or {}).get("identifier", IDENTIFIER)
    options = []
    for number, entry in enumerate(given):
        where = f"{NAME}[{number}]"
        check_mapping(entry, where)
        check_params(ConceptOptions, entry, where)
        options.append(ConceptOptions(**{"identifier": shared, **entry}))
    _check_one_place(configs)
    has_class = [option.reg_data_root is not None for option in options]
    if configs.get("reg") is None and any(has_class):
        warn_once(
            "data.params.concepts: reg_data_root is not used, for there is no data.params.reg"
        )
    elif configs.get("reg") is not None and not all(has_class):
        number = has_class.index(False)
        problem = "no folder for its class images: give reg_data_root, or leave data.params.reg out"
        raise ParameterError(f"{NAME}[{number}]", problem)
    for first, second in combinations(range(len(options)), 2):
        _check_pair(options[first], options[second], f"{NAME}[{first}]", f"{NAME}[{second}]")
    return [
        Concept(option.of(configs), num_class_images, option.weight, f"{NAME}[{number}]")
        for number, option in enumerate(options)
    ]


def _check_one_place(configs: Configs) -> None:
    """Raise a `UserError` if a folder is named beside the list, where it would have no effect."""
    for name, config in configs.items():
        params = (config or {}).get("params") or {}
        for key in ("data_root", "placeholder_token"):
            if params.get(key) is not None:
                flag = {"data_root": "--data_root", "placeholder_token": "--class_word"}[key]
                flag = "--reg_data_root" if (name, key) == ("reg", "data_root") else flag
                raise ParameterError(
                    f"{name}.params.{key}",
                    f"data.params.concepts says it of each subject: leave {flag} out",
                )


def _check_pair(first: ConceptOptions, second: ConceptOptions, one: str, two: str) -> None:
    """Raise a `UserError` if two subjects cannot be told from each other."""
    photos, others = (Path(option.data_root).expanduser() for option in (first, second))
    if _overlaps(photos, others):
        raise ParameterError(
            f"{two}.data_root",
            f"{others} and {photos} of {one} overlap: give each subject a folder of its own",
        )
    if first.identifier.lower() == second.identifier.lower():
        raise ParameterError(
            f"{two}.identifier",
            f"'{second.identifier}' names {one} in {photos}, too: give each subject an identifier "
            "of its own, or put all photos of one subject into one folder",
        )
    if first.reg_data_root is None or second.reg_data_root is None:
        return
    own, theirs = (Path(o.reg_data_root or "").expanduser() for o in (first, second))
    # Subjects of one class may share its images; a folder of two classes would teach both wrongly.
    is_one = own == theirs or (own.exists() and theirs.exists() and own.samefile(theirs))
    same_class = (first.class_word, first.class_templates) == (
        second.class_word,
        second.class_templates,
    )
    if _overlaps(own, theirs) and not (is_one and same_class):
        raise ParameterError(
            f"{two}.reg_data_root",
            f"{theirs} and {own} of {one} overlap, and are of '{second.class_word}' and "
            f"'{first.class_word}': give each class a folder of its own",
        )


def _overlaps(first: Path, second: Path) -> bool:
    if first == second:
        return True
    if first.exists() and second.exists() and first.samefile(second):
        return True
    return is_searched(first, second) or is_searched(second, first)
