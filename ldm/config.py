"""Configs: YAML files and `key.path=value` overrides, merged left to right, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError, nearest
from ldm.util import check_mapping, check_params, get_obj_from_str

# Keys outside of `params`, which the signatures of their targets check.
SECTIONS: dict[str, tuple[str, ...]] = {
    "": ("model", "data", "lightning", "run"),
    "model": ("base_learning_rate", "target", "params"),
    "data": ("target", "params"),
    "lightning": ("trainer", "callbacks", "modelcheckpoint"),
    "lightning.modelcheckpoint": ("target", "params"),
    "run": ("seed", "scale_lr", "export", "base_model"),
}


def load_yaml(path: str | Path) -> DictConfig:
    """One YAML file.

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


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """The files merged left to right, then the `key.path=value` overrides.

    Raises:
        UserError: a file or an override that cannot be read.
    """
    configs = [load_yaml(path) for path in paths]
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError(f"'{override}': an override has the form key.path=value")
    try:
        return OmegaConf.merge(*configs, OmegaConf.from_dotlist(list(overrides)))  # type: ignore[return-value]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"cannot merge the configs: {' '.join(str(error).split())}") from error


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved."""
    if not isinstance(config, DictConfig):
        return dict(config)
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"cannot resolve the config: {' '.join(str(error).split())}") from error


def check_config(config: Mapping[str, Any], trainer_keys: Sequence[str] = ()) -> None:
    """Check every key that a section or the signature of a `target` decides on.

    Raises:
        UserError: names the key's path in the YAML, the nearest valid key and the accepted ones.
    """
    for section, accepted in SECTIONS.items():
        _check_keys(_get(config, section), accepted, section)
    if trainer_keys:
        _check_keys(_get(config, "lightning.trainer"), trainer_keys, "lightning.trainer")
    for section in ("model", "data"):
        if "target" not in _get(config, section):
            raise UserError(f"{section}: the config has no {section}.target; give a complete one with --base")
    _check_targets(config, "")


def _get(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for key in path.split(".") if path else ():
        config = config.get(key) or {}
    check_mapping(config, path)
    return config


def _check_keys(config: Mapping[str, Any], accepted: Sequence[str], path: str) -> None:
    for key in config:
        if key not in accepted:
            where = f"{path}.{key}" if path else str(key)
            raise UserError(f"{where}: unknown key{nearest(str(key), list(accepted))}; accepted: {', '.join(accepted)}")


def _check_targets(node: Any, path: str) -> None:
    """Bind the params of every `target` below `node` to its signature, without calling it.

    What is filled in later (data roots, the configs of callbacks' parents) has defaults there.
    """
    if isinstance(node, Mapping):
        if "target" in node:
            cls = get_obj_from_str(node["target"], f"{path}.target")
            check_mapping(params := node.get("params") or {}, f"{path}.params")
            check_params(cls, params, f"{path}.params")
        for key, value in node.items():
            _check_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _check_targets(value, f"{path}[{index}]")
