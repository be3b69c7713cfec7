"""How a picture was made, as text inside its PNG file.

Two entries say it. `parameters` is the text that AUTOMATIC1111's web UI writes and that other
programs read:

    photo of a sks dog
    Negative prompt: blurry
    Steps: 50, Sampler: DDIM, Schedule type: Automatic, CFG scale: 7.5, Seed: 42, Size: 512x512,
        Model: my-dog

`dreambooth` is JSON with everything that the picture is a function of, for our own programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.checkpoints.export import sha256
from ldm.errors import UserError
from ldm.host import environment
from ldm.sampling.infotext import infotext

if TYPE_CHECKING:
    from ldm.sampling.text_to_image import Recipe

OURS, INFOTEXT = "dreambooth", "parameters"


def picture_texts(
    prompt: str,
    recipe: Recipe,
    negative_prompt: str = "",
    model: str | None = None,
    model_sha256: str | None = None,
    index: int = 0,
    **more: object,
) -> dict[str, str]:
    """Return the texts of a picture's PNG file, by key.

    Args:
        model: the name of the weights' file, without its suffix; left out if it is not known, as is
            `model_sha256`.
        index: the picture's number in its series; its noise is a function of the seed and this.
        more: goes into our own entry alone.
    """
    # The first entry is for other programs, which know its form. Ours is complete.
    everything = {"prompt": prompt, **asdict(recipe), "negative_prompt": negative_prompt}
    everything |= {"index": index, "model": model, "model_sha256": model_sha256, **more}
    everything["environment"] = environment()
    return {
        INFOTEXT: infotext(prompt, recipe, negative_prompt, model, model_sha256, index),
        OURS: json.dumps(everything, ensure_ascii=False),
    }


def png_info(texts: Mapping[str, str]) -> PngInfo:
    """Return texts in the form in which a PNG file holds them."""
    # Keys and texts as the PNG standard has them, for any program.
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)  # iTXt, unless Latin-1 has all its letters
    return info


def weights_names(checkpoint: Path) -> dict[str, str]:
    """Return the name and, of a single file, the digest by which other programs know a
    checkpoint.
    """
    # A folder and an index of shards have no digest by which others know them.
    if not checkpoint.is_file() or checkpoint.suffix == ".json":
        return {"model": checkpoint.name}
    # A digest reads the whole file: remember it until the file changes.
    state = checkpoint.stat()
    digest = _digest(checkpoint, state.st_mtime_ns, state.st_size)
    return {"model": checkpoint.stem, "model_sha256": digest}


@cache
def _digest(path: Path, changed: int, size: int) -> str:
    """Return a file's SHA-256, computed once for as long as the file stays as it is."""
    return sha256(path)


def read_recipe(picture: str | Path | Image.Image) -> dict[str, Any] | None:
    """Return what our entry of a picture's PNG file says, None if it has none.

    Older pictures of ours have the same JSON under `parameters`.

    Raises:
        UserError: the file is no image, or its texts cannot be read.
    """
    # A file is opened for as long as its texts are read.
    if not isinstance(picture, Image.Image):
        try:
            with Image.open(picture) as opened:
                return read_recipe(opened)
        except Exception as error:  # Pillow's readers raise whatever their parsers do
            problem = f"cannot read the texts of this image ({error}); replace or remove it"
            raise UserError(f"{picture}: {problem}") from error
    return recipe_in(getattr(picture, "text", {}))


def recipe_in(texts: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return what our entry among a picture's texts says; None if it is not there."""
    # The web UI's `parameters` are no JSON, and so are passed over.
    for key in (OURS, INFOTEXT):
        try:
            found = json.loads(texts.get(key, ""))
        except ValueError:
            continue
        if isinstance(found, dict) and "prompt" in found:
            return found
    return None
