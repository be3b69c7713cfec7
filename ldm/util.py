"""`instantiate_from_config`: a YAML's `target` and `params` become an object, or an error that helps."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import UserError, nearest

# Modules that have moved: a target in a YAML or a saved run may still name the old place.
RENAMED = {
    "ldm.lr_scheduler": "ldm.optim.schedules",
    "ldm.data.world": "ldm.tiny.world",
    "ldm.models.clip": "ldm.tiny.clip",
    "ldm.optim": "ldm.optim.registry",
    "ldm.backward_optimizer": "ldm.optim.in_backward",
}


def get_obj_from_str(target: str, where: str = "target") -> Callable[..., Any]:
    """The object that a dotted path such as `ldm.models.autoencoder.AutoencoderKL` names."""
    module_name, _, name = str(target).rpartition(".")
    module_name = RENAMED.get(module_name, module_name)
    if not module_name or not all(part.isidentifier() for part in str(target).split(".")):
        raise UserError(f"{where}: '{target}' is not a dotted path such as 'package.module.Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{where}: '{target}' needs the package '{error.name}': pip install it") from error
        raise UserError(f"{where}: unknown target '{target}': there is no module '{error.name}'") from error
    if not hasattr(module, name):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise UserError(f"{where}: unknown target '{target}': {module_name} has no '{name}'{nearest(name, public)}")
    if not callable(found := getattr(module, name)):
        raise UserError(f"{where}: '{target}' is not a class or function, but a {type(found).__name__}")
    return found


def instantiate_from_config(config: Mapping[str, Any], where: str = "config", **overrides: Any) -> Any:
    """Build the object that `config["target"]` names from `config["params"]`, updated with `overrides`.

    `where` is the config's path in the YAML, for messages.

    Raises:
        UserError: no or unknown target, or params that its signature does not accept; the message names
            the YAML path, the key and the accepted ones.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"{where}: expected a mapping with a 'target' key, got {config!r}")
    if unknown := set(config) - {"target", "params"}:
        key = sorted(unknown)[0]
        raise UserError(f"{where}.{key}: unknown key{nearest(key, ['target', 'params'])}; accepted: target, params")
    cls = get_obj_from_str(config["target"], f"{where}.target")
    check_mapping(params := config.get("params") or {}, f"{where}.params")
    params = {**params, **overrides}
    check_params(cls, params, f"{where}.params")
    return cls(**params)


def check_mapping(value: Any, where: str) -> None:
    """Raise a `UserError` if a part of the config is no mapping."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping, got {value!r}")


def check_params(cls: Callable[..., Any], params: Mapping[str, Any], where: str) -> None:
    """Raise a `UserError` if `cls(**params)` would not bind."""
    try:
        signature = inspect.signature(cls)
    except ValueError:  # a builtin without a signature: let the call itself complain
        return
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = None
    else:
        accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in params:
            if key not in accepted:
                raise UserError(
                    f"{where}.{key}: unknown key for {cls.__qualname__}{nearest(str(key), accepted)}; "
                    f"accepted: {', '.join(accepted)}"
                )
    for parameter in parameters:
        if parameter.name in params:
            _check_type(params[parameter.name], parameter.annotation, f"{where}.{parameter.name}")
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := [name for name in required if name not in params]:
        raise UserError(f"{where}: {cls.__qualname__} needs {', '.join(missing)}")


_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _check_type(value: Any, annotation: Any, where: str) -> None:
    """Raise a `UserError` if a value is not of a plain type that the signature asks for; others are not checked."""
    names = [name.strip() for name in str(getattr(annotation, "__name__", annotation)).split("|")]
    if not all(name in _PLAIN_TYPES or name == "None" for name in names):
        return
    accepted = tuple(kind for name in names for kind in _PLAIN_TYPES.get(name, (type(None),)))
    if not isinstance(value, accepted) or (isinstance(value, bool) and "bool" not in names):
        raise UserError(f"{where}: expected {' or '.join(names)}, got {value!r}")
