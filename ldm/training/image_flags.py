"""What the flags say of images: folders, the class word, and whether class images are wanted."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.training.defaults import WITHOUT_CLASS_IMAGES

log = logging.getLogger(__name__)


def images_of(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Return the folders of images and the class word of the flags, by the keys of the datasets."""
    values: dict[str, Any] = {}
    for flag in ("data_root", "reg_data_root", "class_word"):
        if config.concepts and getattr(args, flag):
            raise UserError(f"--{flag}: data.params.concepts says it of each subject: leave it out")
    roots = {"train": args.data_root, "reg": args.reg_data_root, "validation": args.data_root}
    for name, root in roots.items():
        if not config.get(f"data.params.{name}"):
            if name == "reg" and root:
                raise UserError("--reg_data_root: the config has no data.params.reg section")
            continue
        if root:
            values[f"data.params.{name}.params.data_root"] = root
        if args.class_word:
            values[f"data.params.{name}.params.placeholder_token"] = args.class_word
    return values


def new_words_of(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Return what new words start as, and the first of them as the identifier of captions."""
    values: dict[str, Any] = {}
    words = config.new_words
    if not words:
        return values
    key = "model.params.personalization_config.params.initializer_words"
    if args.init_word:
        values[key] = [args.init_word, *config.get(key, [])[1:]]
    for name in ("train", "validation"):
        section = f"data.params.{name}"
        # Of several subjects, each has its own.
        if config.concepts:
            break
        takes_one = str(config.get(f"{section}.target")).endswith(".PersonalizedBase")
        if takes_one and config.get(f"{section}.params.identifier") is None:
            values[f"{section}.params.identifier"] = words[0]
    return values


def needs_no_class_images(config: RunConfig) -> bool:
    """Return whether no class images are wanted, nor a folder named for them but the subject's."""
    roots = [entry.get("reg_data_root") for entry in config.concepts]
    root = next(filter(None, roots), config.get("data.params.reg.params.data_root"))
    if config.learns_words_alone:
        if root:
            log.warning("%s: not used: captions of the class hold none of the new words", root)
        return bool(config.get("data.params.reg"))
    method = config.get("model.params.preservation")
    if isinstance(method, Mapping):
        method = method.get("method")
    weighs = config.get("model.params.reg_weight", 1.0) and method not in WITHOUT_CLASS_IMAGES
    if weighs or not config.get("data.params.reg"):
        return False
    if root and str(root) == str(config.get("data.params.train.params.data_root")):
        why = f"preservation is {method}" if method in WITHOUT_CLASS_IMAGES else "reg_weight is 0"
        log.warning(
            "%s: the folder of the subject and of the class: model.params.%s, so no "
            "class images are used",
            root,
            why,
        )
        return True
    return not root
