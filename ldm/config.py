"""Configs: YAML files and `key.path=value`, merged left to right, checked, and asked by
`RunConfig`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError, nearest
from ldm.util import check_mapping, check_params, get_obj_from_str, legacy_keys

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent
# The folder with `main.py`, `configs/`, `scripts/` and `models/`: the checkout, or what a wheel
# brings.
PROJECT = _PACKAGE / "project" if (_PACKAGE / "project").is_dir() else _PACKAGE.parent

# Keys outside of `params`, which the signatures of their targets check.
SECTIONS: dict[str, tuple[str, ...]] = {
    "": ("model", "data", "lightning", "run"),
    "model": ("base_learning_rate", "target", "params"),
    "data": ("target", "params"),
    "lightning": ("trainer", "callbacks", "modelcheckpoint"),
    "lightning.modelcheckpoint": ("target", "params"),
    "run": ("seed", "scale_lr", "export", "base_model", "working_folder", "class_clip", "chosen"),
}

SEED = 23
LARGEST_SEED = 2**32 - 1  # numpy's
IDENTIFIER = "sks"
EXPORTS = ("fp32", "fp16", "bf16")  # what `run.export` may be
# Keys whose values are files or folders, which may be relative to where the run was started.
PATHS = ("data_root", "reg_data_root", "latent_cache", "ckpt_path")


# Reading and writing


def load_yaml(path: str | Path) -> DictConfig:
    """Read one YAML file.

    Raises:
        UserError: the file is missing, does not parse, or is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: expected a mapping with {', '.join(SECTIONS[''])} at the top")
    return config


def load_config(
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    before: Mapping[str, object] | None = None,
) -> DictConfig:
    """Merge the files left to right, then the `key.path=value` overrides.

    Args:
        before: plain containers that come before all of these.

    Raises:
        UserError: a file or an override that cannot be read.
    """
    first = OmegaConf.create(_escaped(before or {}))
    try:
        merged = OmegaConf.merge(first, *map(load_yaml, paths))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise UserError(f"cannot merge the configs: {' '.join(str(error).split())}") from error
    assert isinstance(merged, DictConfig)
    for override in overrides:
        _override(merged, override)
    return merged


def _override(config: DictConfig, override: str) -> None:
    """Set one `key.path=value` in a config; a number in the path is a place in a list.

    Raises:
        UserError: it has another form, its value does not parse, or its list has no such place.
    """
    path, equals, text = override.partition("=")
    if not path or not equals:
        raise UserError(f"'{override}': an override has the form key.path=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        assert isinstance(value, dict)
        OmegaConf.update(config, path, value["value"], merge=True)
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: there is no such place in the config's list") from error
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: cannot set it to '{text}': {problem}") from error


def to_plain(config: DictConfig | Mapping[str, object]) -> dict[str, Any]:
    """Return the config as plain containers, interpolations resolved.

    Raises:
        UserError: an interpolation that names nothing.
    """
    if not isinstance(config, DictConfig):
        return dict(config)
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"cannot resolve the config: {problem} (a plain ${{ is written \\${{)"
        ) from error


def save_yaml(content: Mapping[str, object], path: str | Path) -> None:
    """Write plain containers as YAML that `load_yaml` reads back, also a text with `${` in it."""
    OmegaConf.save(OmegaConf.create(_escaped(content)), path)


def _escaped(value: object) -> Any:
    """Return nested containers in which no text is an interpolation of OmegaConf's."""
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # A backslash escapes; those before a `${` have to be escaped themselves.
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found.group(1) + r"\${", value)


# Asking


@dataclass(frozen=True)
class RunConfig:
    """Answers what is asked of a config. It is never changed: `having` returns another one.

    Args:
        content: the config as plain containers, with the sections model, data, lightning and run.
    """

    content: Mapping[str, Any]

    def get(self, path: str, default: object = None) -> Any:
        """Return the value at a dotted path, or the default where there is none, or null."""
        value: object = self.content
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return default if value is None else value

    def section(self, path: str) -> Mapping[str, Any]:
        """Return the mapping at a dotted path, an empty one if there is none."""
        found = self.get(path, {})
        check_mapping(found, path)
        return found

    def having(self, values: Mapping[str, object]) -> RunConfig:
        """Return the config with other values at some dotted paths, whose sections are made."""
        content = deepcopy(dict(self.content))
        for path, value in values.items():
            *parents, last = path.split(".")
            section = content
            for depth, key in enumerate(parents, 1):
                if section.get(key) is None:
                    section[key] = {}
                section = section[key]
                check_mapping(section, ".".join(parents[:depth]))
            section[last] = value
        return RunConfig(content)

    def without(self, *paths: str) -> RunConfig:
        """Return the config without the keys at some dotted paths."""
        content = deepcopy(dict(self.content))
        for path in paths:
            parent, _, last = path.rpartition(".")
            RunConfig(content).section(parent).pop(last, None)  # type: ignore[attr-defined]
        return RunConfig(content)

    @property
    def model(self) -> Mapping[str, Any]:
        """Return the model's target and params, for `instantiate_from_config`."""
        return self.section("model")

    @property
    def data(self) -> Mapping[str, Any]:
        """Return the data module's target and params, for `instantiate_from_config`."""
        return self.section("data")

    @property
    def trainer(self) -> Mapping[str, Any]:
        """Return the arguments of Lightning's Trainer."""
        return self.section("lightning.trainer")

    @property
    def seed(self) -> int:
        """Return the seed of everything random.

        Raises:
            UserError: no whole number that numpy takes for a seed.
        """
        seed = self.get("run.seed", SEED)
        if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
            raise UserError(
                f"run.seed (--seed): expected a whole number from 0 to {LARGEST_SEED}, got {seed!r}"
            )
        return seed

    @property
    def scale_lr(self) -> bool:
        """Return whether learning rates grow with accumulated batches, devices and batch size."""
        scale = self.get("run.scale_lr", False)
        if not isinstance(scale, bool):
            raise UserError(f"run.scale_lr (--scale_lr): expected true or false, got {scale!r}")
        return scale

    @property
    def export(self) -> str | None:
        """Return the precision in which a finished run exports its weights; None for no export."""
        precision = self.get("run.export")
        if precision not in (None, *EXPORTS):
            raise UserError(f"run.export: unknown '{precision}'; accepted: {', '.join(EXPORTS)}")
        return precision

    def check_settings(self) -> None:
        """Raise a `UserError` for a setting of the run that is out of range."""
        _ = self.seed, self.scale_lr, self.export
        clip = self.get("run.class_clip", "")
        if not isinstance(clip, str):
            raise UserError(f"run.class_clip: expected a CLIP's name or file, got {clip!r}")

    @property
    def base_learning_rate(self) -> float:
        """Return the learning rate before it is scaled.

        Raises:
            UserError: there is none, or no positive number.
        """
        rate = self.get("model.base_learning_rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise UserError(f"model.base_learning_rate: expected a positive number, got {rate!r}")
        return float(rate)

    @property
    def identifier(self) -> str:
        """Return the rare word that names the subject in its captions."""
        return self.get("data.params.train.params.identifier", IDENTIFIER)

    @property
    def concepts(self) -> list[Mapping[str, Any]]:
        """Return what the config says of each of several subjects; empty for a single one."""
        found = self.get("data.params.concepts", [])
        is_list = isinstance(found, (list, tuple))
        return [entry for entry in found if isinstance(entry, Mapping)] if is_list else []

    @property
    def identifiers(self) -> list[str]:
        """Return the identifier of each subject."""
        own = self.identifier
        return [entry.get("identifier", own) for entry in self.concepts] or [own]

    @property
    def new_words(self) -> list[str]:
        """Return the words that the model learns, or has learned, beside its vocabulary."""
        section = "model.params.personalization_config"
        # LDM's DreamBooth scripts keep the section, and train the model instead.
        if self.get("model.params.unfreeze_model"):
            return []
        found = self.get(f"{section}.params.placeholder_strings", [])
        return list(found) if isinstance(found, (list, tuple)) else []

    @property
    def learns_words_alone(self) -> bool:
        """Return whether new words are all that a training changes (Textual Inversion)."""
        pivotal = self.get("model.params.personalization_config.params.pivotal", False)
        return bool(self.new_words) and not pivotal


# Checking


def check_config(config: Mapping[str, object], trainer_keys: Sequence[str] = ()) -> None:
    """Check every key by its section or the signature of its `target`; say which have no effect.

    Raises:
        UserError: names the key's path in the YAML, the nearest valid key and the accepted ones.
    """
    asked = RunConfig(config)
    for section, accepted in SECTIONS.items():
        _check_keys(asked.section(section) if section else config, accepted, section)
    if trainer_keys:
        _check_keys(asked.trainer, trainer_keys, "lightning.trainer")
    for section in ("model", "data"):
        if "target" not in asked.section(section):
            raise UserError(
                f"{section}: the config has no {section}.target; give a complete one with --base"
            )
    without_effect = list(_check_targets(config, ""))
    if without_effect:
        log.warning("without effect here: %s", ", ".join(without_effect))


def _check_keys(config: Mapping[str, object], accepted: Sequence[str], path: str) -> None:
    for key in config:
        if key not in accepted:
            where = f"{path}.{key}" if path else str(key)
            hint = nearest(str(key), accepted)
            raise UserError(f"{where}: unknown key{hint}; accepted: {', '.join(accepted)}")


def _check_targets(node: object, path: str) -> Iterator[str]:
    """Check the params of every `target` below a node against its signature, without calling it.

    What is filled in later (data roots, the configs of callbacks' parents) has defaults there.

    Yields:
        the keys without effect, each with what to use instead.
    """
    legacy: Mapping[str, str] = {}
    if isinstance(node, Mapping) and "target" in node:
        cls = get_obj_from_str(node["target"], f"{path}.target")
        params = node.get("params") or {}
        check_mapping(params, f"{path}.params")
        legacy = legacy_keys(cls, params)
        check_params(
            cls,
            {key: value for key, value in params.items() if key not in legacy},
            f"{path}.params",
        )
        for key, instead in legacy.items():
            if params[key] not in (None, False):
                yield f"{path}.params.{key}" + (f" ({instead})" if instead else "")
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = _check_targets(value, f"{path}.{key}" if path else str(key))
            # One line for a section without effect, not one for each key inside.
            yield from (
                text
                for text in below
                if not text.startswith(tuple(f"{path}.params.{k}." for k in legacy))
            )
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _check_targets(value, f"{path}[{index}]")
