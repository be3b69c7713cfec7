"""A picture's recipe, read back from its file as the flags that draw it again.

Our own pictures say everything. Those of AUTOMATIC1111's web UI say a prompt and a recipe, but draw
their noise in another way, so theirs gives another picture of the same kind.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.modules.encoders.weighting import A1111, reads_differently
from ldm.sampling.infotext import SIZE, parse_infotext, web_ui_schedule
from ldm.sampling.metadata import INFOTEXT, read_recipe, weights_names
from ldm.sampling.text_to_image import Recipe

log = logging.getLogger(__name__)

# Fields of `Recipe` whose flag has an older name.
FLAG_OF = {"steps": "ddim_steps", "eta": "ddim_eta", "height": "H", "width": "W"}
# Names that an axis of a grid has in other programs, and the older ones of ours.
AXES = {
    "checkpoint": "ckpt",
    "cfg": "scale",
    "ddim_steps": "steps",
    "ddim_eta": "eta",
    "height": "H",
    "width": "W",
}
# Flags beside the recipe that our pictures have the values of.
OTHERS = (
    *("prompt", "negative_prompt", "config", "weights", "embedding_path", "precision", "ckpt"),
    *("init_img", "mask", "box", "padding", "compile", "vae_tiling", "vae_slicing"),
    *("sr_ckpt", "sr_steps", "sr_scale", "sr_sampler", "augmentation"),
)
# Flags of files that a picture is made from, beside the model's.
FILES = ("embedding_path", "guide_ckpt", "init_img", "mask", "sr_ckpt")
# What a value of our entry is, where another one would fail far from here.
KINDS: dict[str, Any] = {
    **get_type_hints(Recipe),
    **dict.fromkeys(("prompt", "negative_prompt", "precision"), str),
    **dict.fromkeys(("ckpt", "config", "weights", "model_sha256", *FILES), str | None),
    **dict.fromkeys(("index", "batch", "place", "padding"), int),
    **dict.fromkeys(("compile", "vae_tiling", "vae_slicing"), bool),
}
# Any of these asks for more than the one picture.
OF_A_SERIES = {"n_samples", "n_iter", "only", "from_file", "suite"}


def flags_of_picture(path: str | Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return values of flags, by name, that draw a picture again.

    Args:
        args: has all flags of the command, and in `given` the names of those that the user gave.

    Raises:
        UserError: no picture, or one that does not say how it was made or by what.
    """
    # Our own entry is complete, so it comes before the text for other programs.
    path = Path(path)
    found, text = _read(path)
    values = _of_ours(path, found, args) if found is not None else _of_web_ui(path, text, args)

    # A sampler that is given leaves the picture's behind, with what belongs to that.
    if {"sampler", "plms"} & (args.given | _varied(args)):
        for name in ("sampler", "schedule", "ddim_eta"):
            values.pop(name, None)
    return values


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return our entry of a picture's file and the web UI's text; None and "" if there is none."""
    try:
        with Image.open(path) as picture:
            texts: Mapping[str, Any] = getattr(picture, "text", {})
            return read_recipe(picture), str(texts.get(INFOTEXT, ""))
    except FileNotFoundError:
        raise UserError(f"--like {path}: no such file") from None
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"--like {path}: cannot read this picture ({error})") from error


# Our own pictures


def _of_ours(path: Path, found: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    _check_kinds(path, found)
    # The flags beside the recipe, as far as this command has them.
    values = {name: found[name] for name in OTHERS if name in found and hasattr(args, name)}
    # The recipe. A value that this command cannot follow would give another picture: refuse it.
    for field in fields(Recipe):
        flag = FLAG_OF.get(field.name, field.name)
        if field.name not in found:
            continue
        if hasattr(args, flag):
            values[flag] = found[field.name]
        elif found[field.name] != field.default:
            raise UserError(
                f"--like {path}: its recipe has {field.name} {found[field.name]}, for which this "
                "command has no flag"
            )

    # One picture of a series, in a batch as large as the one that it was drawn in: kernels may
    # round differently in another one.
    if not OF_A_SERIES & args.given:
        index = 0 if "seed" in args.given | _varied(args) else int(found.get("index", 0))
        if index and "noise_seed" not in found:
            raise UserError(
                f"--like {path}: is of an earlier version, which numbered noise in another way: "
                "only the first picture of its series can be drawn again"
            )
        size, place = found.get("batch", 1), found.get("place", 0)
        if not 0 <= place < size:
            raise UserError(
                f"--like {path}: says place {place} of a batch of {size}: was it edited?"
            )
        batch = None if args.exact else (size, place)
        values.update(_one_picture(index, args), like_batch=batch)
    values["like_device"] = found.get("device")

    # The picture is a function of these files as well, so they have to be the same.
    _check_weights(path, found, args)
    _check_files(path, found, args)
    return values


def _check_kinds(path: Path, found: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a value of another kind than we write, which somebody has edited."""
    for name, value in found.items():
        if name in KINDS and not _is_of(value, KINDS[name]):
            raise UserError(f"--like {path}: {name} {value!r} is not what we write: was it edited?")


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value of JSON is of a kind: a type, `X | None`, or a tuple of numbers."""
    options = get_args(kind)
    if type(None) in options:
        return value is None or _is_of(value, options[0])
    if options:
        return isinstance(value, list) and all(_is_of(one, options[0]) for one in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _varied(args: argparse.Namespace) -> set[str]:
    """Return the names of the flags that vary in a grid."""
    axes = (getattr(args, "x", None), getattr(args, "y", None))
    return {axis_name(axis.partition("=")[0]) for axis in axes if axis}


def axis_name(given: str) -> str:
    """Return our own name of what varies along an axis; one that is not known stays as it is."""
    return AXES.get(given.strip(), given.strip())


def _one_picture(index: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that draw one picture of a series, which needs no sheet."""
    alone = {"only": [index], "n_samples": 1, "n_iter": 1, "fixed_code": False}
    return alone if _varied(args) else {**alone, "skip_grid": True}


def digests_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the SHA-256 of each file that a picture is made from, beside the model's."""
    paths = {name: Path(getattr(args, name, None) or "") for name in FILES}
    found = {name: weights_names(path) for name, path in paths.items() if path.is_file()}
    return {name: names["model_sha256"] for name, names in found.items() if len(names) > 1}


def _check_files(path: Path, found: Mapping[str, object], args: argparse.Namespace) -> None:
    """Raise a `UserError` if a file that a picture was made from is not there, or not as it was."""
    # A file under the same name may hold something else by now: digests tell.
    now = digests_of(argparse.Namespace(**{name: found.get(name) for name in FILES}))
    for name in FILES:
        recorded = found.get(f"{name}_sha256")
        if recorded and name not in args.given and recorded != now.get(name):
            raise UserError(
                f"--like {path}: {found[name]} is not the file any more that it was drawn with: "
                f"give --{name} FILE"
            )


def _check_weights(path: Path, found: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Compare the weights that the command will take with those that drew a picture.

    Raises:
        UserError: they are not given by the user, and not there or others.
    """
    # Weights that the user names are wanted, so others than the picture's are only warned of.
    recorded = found.get("model_sha256") or ""
    if "ckpt" in args.given:
        # A digest of the web UI is shorter.
        now = weights_names(Path(args.ckpt)).get("model_sha256", "") if recorded else ""
        if now and not now.startswith(recorded):
            log.warning("%s: was drawn by other weights than %s", path, args.ckpt)
        return
    # A grid over checkpoints takes none of the picture's.
    if "ckpt" in _varied(args):
        return
    # Weights that nobody named have to be the very ones that drew the picture.
    ckpt = found.get("ckpt")
    if not ckpt:
        named = f"by '{found['model']}' " if found.get("model") else ""
        digest = f"({recorded}) " if recorded else ""
        raise UserError(f"--like {path}: was drawn {named}{digest}elsewhere: give --ckpt FILE")
    if not Path(ckpt).exists():
        raise UserError(f"--like {path}: {ckpt}, which drew it, is not there: give --ckpt FILE")
    if recorded and weights_names(Path(ckpt)).get("model_sha256") != recorded:
        raise UserError(
            f"--like {path}: {ckpt} is not the file any more that drew it: give --ckpt FILE"
        )


# Pictures of the web UI


def _of_web_ui(path: Path, text: str, args: argparse.Namespace) -> dict[str, Any]:
    parsed = parse_infotext(text)
    if parsed is None:
        raise UserError(
            f"--like {path}: nothing in it says how it was made (read are PNG files of this "
            "project and of AUTOMATIC1111's web UI)"
        )
    prompt, negative, given = parsed
    left: list[str] = []  # what is in the text and not in our recipe

    def take(name: str) -> str | None:
        return given.pop(name, None)

    # The fields that are a flag of ours, each under its own name and kind.
    values: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    for name, flag, kind in (
        ("Steps", "ddim_steps", int),
        ("CFG scale", "scale", float),
        ("Seed", "seed", int),
        ("Eta DDIM", "ddim_eta", float),
        ("Denoising strength", "strength", float),
        ("Mask blur", "mask_blur", int),
    ):
        if name in given and hasattr(args, flag):
            value = given.pop(name)
            # A flag takes the field's place, so the field is not read: it may be damaged.
            if flag not in args.given:
                values[flag] = _number(path, name, value, kind)
    # One field holds both sides.
    size = SIZE.fullmatch(given.get("Size", ""))
    if size:
        del given["Size"]
        values["W"], values["H"] = int(size[1]), int(size[2])

    # The sampler, unless it is one that we have not: then the picture's recipe is not ours.
    sampler, schedule = take("Sampler"), take("Schedule type")
    if sampler is not None and not {"sampler", "plms"} & args.given:
        try:
            plain, own = find_sampler(sampler)
            # The web UI writes its last schedule also beside samplers that do not read it.
            schedule = None if own is None else schedule
            values["sampler"], values["schedule"] = find_sampler(
                sampler, web_ui_schedule(plain, schedule)
            )
        except UserError as error:
            raise UserError(f"--like {path}: {error}; choose one with --sampler") from error

    # The web UI reads brackets and long prompts, unless the text says that it did not.
    if hasattr(args, "weighting") and take("Emphasis") != "None":
        values["weighting"] = _weighting(path, prompt, negative)

    # Say what else the text asks for.
    model = {"model": take("Model"), "model_sha256": take("Model hash")}
    left += [f"{name} {value}" for name, value in given.items() if name != "Version"]
    left += re.findall(r"<\w+:[^>]*>", prompt + negative)
    if left:
        log.warning("%s: not part of a recipe here, and left out: %s", path, ", ".join(left))
    log.info(
        "%s: read from the text of a web UI, which draws other noise: expect another picture by "
        "this recipe, unless this project has drawn it",
        path,
    )
    # The text speaks of one picture, whose seed it names: draw that one alone.
    if not OF_A_SERIES & args.given:
        values.update(_one_picture(0, args))
    _check_weights(path, model, args)
    return values


def _weighting(path: Path, *prompts: str) -> str | None:
    try:
        return A1111 if any(map(reads_differently, prompts)) else None
    except UserError as error:
        log.warning("%s: brackets are read as plain words: %s", path, error)
        return None


def _number(path: Path, name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"--like {path}: {name}: expected a number, got {text}") from error
