"""`instantiate_from_config`: a `target` and its `params` become an object, or an error that
helps.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.errors import ParameterError, UserError, nearest, under

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# What has moved, modules and single targets: a YAML or a saved run may still name the old place.
# Where a script may import a single target from there, the module's `__getattr__` calls `moved`.
RENAMED = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.callbacks.image_logger.ImageLogger",
    "main.SetupCallback": "ldm.callbacks.setup.SetupCallback",
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": (
        "ldm.models.diffusion.super_resolution.LatentUpscaleDiffusion"
    ),
    "ldm.modules.encoders.modules.FrozenT5Embedder": "ldm.modules.encoders.t5.FrozenT5Embedder",
    "ldm.lr_scheduler": "ldm.optim.schedules",
    "ldm.data.world": "ldm.tiny.world",
    "ldm.models.clip": "ldm.tiny.clip",
    "ldm.optim": "ldm.optim.registry",
    "ldm.backward_optimizer": "ldm.optim.in_backward",
}


# LDM's YAML files have this beside a model's `target` and `params`. It is for the training command.
SIBLINGS = ("base_learning_rate",)

# Keys of older configs that are accepted without effect: by class, each with what to use instead.
# Instantiation leaves them out; `ldm.config.check_config` says once a run which ones there are.
LEGACY: dict[str, dict[str, str]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": {
        "personalization_config": "unfreeze_model trains the model, not new words; see --init_word",
        "num_timesteps_cond": "",
        "embedding_reg_weight": "",
        "unfreeze_model": "the UNet is trained, unless model.params.freeze names its weights",
        "model_lr": "the learning rate is model.base_learning_rate",
        "log_every_t": "",
        "channels": "",
        "concat_keys": "an inpainting model reads the mask and then the masked image",
        "masked_image_key": "the masked image is made of the image",
        "finetune_keys": "input channels that a file lacks start from 0",
        "keep_finetune_dims": "input channels that a file lacks start from 0",
    },
    "ldm.models.diffusion.super_resolution.LatentUpscaleDiffusion": {
        "noise_level_key": "the level is drawn, or follows from noise_augmentation",
    },
    "ldm.modules.embedding_manager.EmbeddingManager": {
        "per_image_tokens": "",
        "progressive_words": "",
    },
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": {
        "image_size": "",
        "legacy": "",
        "use_fp16": "",
    },
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": {"device": ""},
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": {
        "version": "",
        "device": "",
        "freeze": "",
    },
    "ldm.modules.encoders.t5.FrozenT5Embedder": {"device": "", "freeze": ""},
    "ldm.models.autoencoder.AutoencoderKL": {"colorize_nlabels": ""},
    "ldm.data.datamodule.DataModuleFromConfig": {"wrap": "", "use_worker_init_fn": ""},
    "ldm.data.personalized.PersonalizedBase": {"per_image_tokens": "", "mixing_prob": ""},
    "ldm.callbacks.image_logger.ImageLogger": {
        "log_on_batch_idx": "steps are counted, not batches"
    },
}


# Of those, what has an effect unless another key is true. LDM's DreamBooth scripts have both.
OVERRULED = {"personalization_config": "unfreeze_model"}


def get_obj_from_str(target: str, where: str = "target") -> Callable[..., Any]:
    """Return the object that a dotted path such as `ldm.models.autoencoder.AutoencoderKL` names."""
    module_name, _, name = RENAMED.get(str(target), str(target)).rpartition(".")
    module_name = RENAMED.get(module_name, module_name)
    if not module_name or not all(part.isidentifier() for part in str(target).split(".")):
        raise ParameterError(
            where, f"'{target}' is not a dotted path such as 'package.module.Class'"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not (module_name + ".").startswith(error.name + "."):
            raise ParameterError(
                where, f"'{target}' needs the package '{error.name}': pip install it"
            ) from error
        raise ParameterError(
            where, f"unknown target '{target}': there is no module '{error.name}'"
        ) from error
    if not hasattr(module, name):
        public = [n for n in dir(module) if not n.startswith("_")]
        hint = nearest(name, public)
        raise ParameterError(
            where, f"unknown target '{target}': {module_name} has no '{name}'{hint}"
        )
    found = getattr(module, name)
    if not callable(found):
        raise ParameterError(
            where, f"'{target}' is not a class or function, but a {type(found).__name__}"
        )
    return found


def moved(module: str, name: str) -> Any:
    """Return what has moved out of a module, for the `__getattr__` of that module.

    Raises:
        AttributeError: `RENAMED` does not say that it has moved.
    """
    if f"{module}.{name}" not in RENAMED:
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    return get_obj_from_str(f"{module}.{name}")


def instantiate_from_config(
    config: Mapping[str, Any], where: str = "config", **overrides: Any
) -> Any:
    """Build the object that a config's `target` names from its `params`, updated with `overrides`.

    `LEGACY` keys are left out. A `base_learning_rate` beside the two, as in LDM's files, is let be.

    Args:
        config: a mapping, also one of OmegaConf.
        where: its path in the YAML, for messages; inside a constructor, the name of the parameter.

    Raises:
        UserError: no or unknown target, or params that its signature or constructor refuses. The
            message names the YAML path, the key and the accepted ones.
    """
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if not isinstance(config, Mapping) or "target" not in config:
        raise ParameterError(where, f"expected a mapping with a 'target' key, got {config!r}")
    for key in sorted(set(config) - {"target", "params", *SIBLINGS}):
        hint = nearest(key, ["target", "params"])
        raise ParameterError(f"{where}.{key}", f"unknown key{hint}; accepted: target, params")
    cls = get_obj_from_str(config["target"], f"{where}.target")
    given = config.get("params") or {}
    check_mapping(given, f"{where}.params")
    legacy = legacy_keys(cls, given)
    params = {**{key: value for key, value in given.items() if key not in legacy}, **overrides}
    check_params(cls, params, f"{where}.params")
    try:
        with under(f"{where}.params"):
            return cls(**params)
    except Exception as error:
        if isinstance(error, UserError) or not _refuses_params(cls, error):
            raise
        problem = " ".join(str(error).split())
        raise ParameterError(f"{where}.params", f"{cls.__qualname__}: {problem}") from error


def legacy_keys(cls: Callable[..., object], params: Mapping[str, object]) -> dict[str, str]:
    """Return the params without effect for a class or its bases, each with what to use instead."""
    found: dict[str, str] = {}
    for base in getattr(cls, "__mro__", ()):
        known = LEGACY.get(f"{base.__module__}.{base.__qualname__}", {})
        found |= {key: instead for key, instead in known.items() if key in params}
    if not found:
        return found
    taken = accepted_parameters(cls)  # a class of the user's may have a use for one
    idle = {key for key, other in OVERRULED.items() if params.get(other)}
    return {key: instead for key, instead in found.items() if key not in taken or key in idle}


def _refuses_params(cls: Callable[..., object], error: Exception) -> bool:
    """Return whether an error is a foreign class's way to refuse what it was given.

    Our own classes raise a `UserError` for that: any other error of theirs is a defect, and keeps
    its traceback.
    """
    if (
        type(error).__name__ == "MisconfigurationException"
    ):  # Lightning's, also where ours derive from its classes
        return True
    return not _is_ours(cls) and isinstance(error, (ValueError, TypeError, ImportError))


def accepted_parameters(cls: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return what a class or function takes, by name.

    What a class passes on to its base as `**params` is what the base takes.

    Raises:
        ValueError: it is a builtin without a signature.
    """
    found = dict(inspect.signature(cls).parameters)
    rest = [name for name, p in found.items() if p.kind is p.VAR_KEYWORD]
    bases = [base for base in getattr(cls, "__mro__", ())[1:] if "__init__" in vars(base)]
    if not rest or not bases or not _is_ours(cls) or not _is_ours(bases[0]):
        return found
    del found[rest[0]]
    return {**accepted_parameters(bases[0]), **found}


def _is_ours(cls: Callable[..., object]) -> bool:
    return str(cls.__module__).partition(".")[0] in ("ldm", "main")


def check_mapping(value: object, where: str) -> None:
    """Raise a `UserError` if a part of the config is no mapping."""
    if not isinstance(value, Mapping):
        raise ParameterError(where, f"expected a mapping, got {value!r}")


def check_params(cls: Callable[..., object], params: Mapping[str, object], where: str) -> None:
    """Raise a `UserError` if `cls(**params)` would not bind."""
    try:
        parameters = accepted_parameters(cls).values()
    except ValueError:  # a builtin without a signature: let the call itself complain
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = None
    else:
        accepted = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        for key in params:
            if key not in accepted:
                hint = nearest(str(key), accepted)
                problem = (
                    f"unknown key for {cls.__qualname__}{hint}; accepted: {', '.join(accepted)}"
                )
                raise ParameterError(f"{where}.{key}", problem)
    for parameter in parameters:
        if parameter.name in params:
            _check_type(params[parameter.name], parameter.annotation, f"{where}.{parameter.name}")
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in params]
    if missing:
        raise ParameterError(where, f"{cls.__qualname__} needs {', '.join(missing)}")


_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


_LISTS = ("Sequence", "list", "tuple")


def _check_type(value: object, annotation: object, where: str) -> None:
    """Raise a `UserError` for a value of another type, if an annotation names plain types alone."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    names = []
    for name in str(text or annotation).split("|"):
        kind = name.strip().partition("[")[0]
        names.append("list" if kind in _LISTS else name.strip())
    if not all(name in _PLAIN_TYPES or name in ("list", "None") for name in names):
        return
    # What kinds of lists it takes, a target knows best. A mapping or a number is none of them.
    if "list" in names and not isinstance(value, (Mapping, int, float)):
        return
    accepted = tuple(kind for name in names for kind in _PLAIN_TYPES.get(name, (type(None),)))
    if not isinstance(value, accepted) or (isinstance(value, bool) and "bool" not in names):
        raise ParameterError(where, f"expected {' or '.join(names)}, got {value!r}")


# What scripts of the LDM family import from here, besides


def exists(value: object) -> bool:
    """Return whether a value is given."""
    return value is not None


def default(value: object, fallback: object) -> Any:
    """Return a value, or the fallback (called, if it is a function) where it is not given."""
    if exists(value):
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return how many parameters a network has; log it with `verbose`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        log.info("%s has %.2f M params", type(model).__name__, total / 1e6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Write captions into pictures, (b, 3, height, width) in [-1, 1], for a log.

    Args:
        wh: width and height of a picture.
        xc: the captions, one for each picture.
        size: of the letters.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    pictures = []
    font = ImageFont.load_default(size)
    per_line = max(1, int(40 * wh[0] / 256))
    for caption in xc:
        picture = Image.new("RGB", wh, color="white")
        pieces = [caption[start : start + per_line] for start in range(0, len(caption), per_line)]
        ImageDraw.Draw(picture).text((0, 0), "\n".join(pieces), fill="black", font=font)
        pictures.append(np.asarray(picture).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.tensor(np.stack(pictures), dtype=torch.float32)
