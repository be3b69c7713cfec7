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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from ldm.sampling.text_to_image import Recipe

OURS, INFOTEXT = "dreambooth", "parameters"
# The web UI's names of the samplers and of their schedules.
SAMPLER_NAMES = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "uni_pc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
}
SCHEDULE_NAMES = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "beta": "Beta",
    "ddim_uniform": "DDIM",
    "align_your_steps": "Align Your Steps",
}
SHORT_HASH = 10  # digits of a model's SHA-256 that the web UI shows


def picture_texts(
    prompt: str,
    recipe: Recipe,
    negative_prompt: str = "",
    model: str | None = None,
    model_sha256: str | None = None,
    **more: Any,
) -> dict[str, str]:
    """Return the texts of a picture's PNG file, by key.

    Args:
        model: the name of the weights' file, without its suffix; left out if it is not known, as is
            `model_sha256`.
        more: goes into our own entry alone.
    """
    # The first entry is for other programs, which know its form. Ours is complete.
    everything = {"prompt": prompt, **asdict(recipe), "negative_prompt": negative_prompt, **more}
    return {
        INFOTEXT: infotext(prompt, recipe, negative_prompt, model, model_sha256),
        OURS: json.dumps(everything, ensure_ascii=False),
    }


def png_info(texts: Mapping[str, str]) -> PngInfo:
    """Return texts in the form in which a PNG file holds them."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)  # iTXt, unless Latin-1 has all its letters
    return info


def infotext(
    prompt: str,
    recipe: Recipe,
    negative_prompt: str = "",
    model: str | None = None,
    model_sha256: str | None = None,
) -> str:
    """Return the recipe in the form of AUTOMATIC1111's web UI: prompts, then one line of fields."""
    # The names are the web UI's: its parser fills the settings by them.
    fields: dict[str, Any] = {
        "Steps": recipe.steps,
        "Sampler": SAMPLER_NAMES.get(recipe.sampler, recipe.sampler),
        "Schedule type": SCHEDULE_NAMES.get(recipe.schedule or "", "Automatic"),
        "CFG scale": f"{recipe.scale:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
    }
    # What is not known has no field: the parser would take an empty one for a setting.
    if model_sha256:
        fields["Model hash"] = model_sha256[:SHORT_HASH]
    if model:
        fields["Model"] = model
    if recipe.eta:
        fields["Eta DDIM"] = f"{recipe.eta:g}"
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in fields.items()))
    return "\n".join(lines).strip()


def quoted(value: Any) -> str:
    """Return a field's value as text, in quotation marks if it holds what separates fields."""
    # The web UI quotes in the same way, with JSON.
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def read_recipe(picture: str | Path | Image.Image) -> dict[str, Any] | None:
    """Return what our entry of a picture's PNG file says, None if it has none.

    Older pictures of ours have the same JSON under `parameters`.
    """
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as opened:
            return read_recipe(opened)
    texts: Mapping[str, Any] = getattr(picture, "text", {})
    # The web UI's `parameters` are no JSON, and so are passed over.
    for key in (OURS, INFOTEXT):
        try:
            found = json.loads(texts.get(key, ""))
        except ValueError:
            continue
        if isinstance(found, dict) and "prompt" in found:
            return found
    return None
