"""The text in which AUTOMATIC1111's web UI says how a picture was made: prompts, then one line of
fields.

    photo of a sks dog
    Negative prompt: blurry
    Steps: 50, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x512,
        Model: my-dog
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.sampling.text_to_image import Recipe

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
AUTOMATIC = "Automatic"
# What the web UI takes for "Automatic"; for other samplers it is "normal".
AUTOMATIC_SCHEDULES = {
    "dpm_2": "karras",
    "dpm_2_ancestral": "karras",
    "dpmpp_2s_ancestral": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_3m_sde": "exponential",
}
SHORT_HASH = 10  # digits of a model's SHA-256 that the web UI shows
NEGATIVE = "Negative prompt: "
# A field: its name, and a value that is quoted as in JSON where it has a comma or a colon.
FIELD = re.compile(r'\s*(\w[^:,"]*): ?("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
SIZE = re.compile(r"(\d+)x(\d+)")


def infotext(
    prompt: str,
    recipe: Recipe,
    negative_prompt: str = "",
    model: str | None = None,
    model_sha256: str | None = None,
    index: int = 0,
) -> str:
    """Return the text for a picture, whose seed is the recipe's and its number in the series."""
    # The names are the web UI's: its parser fills the settings by them.
    fields: dict[str, Any] = {
        "Steps": recipe.steps,
        "Sampler": SAMPLER_NAMES.get(recipe.sampler, recipe.sampler),
        "Schedule type": SCHEDULE_NAMES.get(recipe.schedule or "", AUTOMATIC),
        "CFG scale": f"{recipe.scale:.10g}",
        "Seed": recipe.seed + index,
        "Size": f"{recipe.width}x{recipe.height}",
    }
    # What is not known has no field: the parser would take an empty one for a setting.
    if model_sha256:
        fields["Model hash"] = model_sha256[:SHORT_HASH]
    if model:
        fields["Model"] = model
    if recipe.eta:
        fields["Eta DDIM"] = f"{recipe.eta:.10g}"
    if recipe.strength is not None:
        fields["Denoising strength"] = f"{recipe.strength:.10g}"
    if recipe.mask_blur is not None:
        fields["Mask blur"] = recipe.mask_blur
    # The web UI reads brackets. A prompt that was drawn as plain words has to say so.
    if recipe.weighting is None and re.search(r"[(\[\\]|\bBREAK\b", prompt + negative_prompt):
        fields["Emphasis"] = "None"
    # The prompt may have several lines, so the fields come last, in one.
    lines = [prompt]
    if negative_prompt:
        lines.append(NEGATIVE + negative_prompt)
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in fields.items()))
    return "\n".join(lines).strip()


def quoted(value: object) -> str:
    """Return a field's value as text, in quotation marks if it holds what separates fields."""
    # The web UI quotes in the same way, with JSON.
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def unquoted(text: str) -> str:
    """Return a field's value without the quotation marks of `quoted`."""
    if not text.startswith('"'):
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def parse_infotext(text: str) -> tuple[str, str, dict[str, str]] | None:
    """Return the prompt, the negative prompt and the fields of a text; None if it is no such text.

    A prompt may have several lines. The fields are the last line.
    """
    # A text without "Steps" is somebody's comment, not a recipe.
    above, _, last = text.strip().rpartition("\n")
    fields = {name.strip(): unquoted(value) for name, value in FIELD.findall(last)}
    if "Steps" not in fields:
        return None
    prompt, mark, negative = f"\n{above}".partition(f"\n{NEGATIVE}")
    return prompt.strip(), negative.strip() if mark else "", fields


def web_ui_schedule(sampler: str, name: str | None) -> str | None:
    """Return our name of the schedule that a text of the web UI names for one of our samplers.

    Older versions have no such field: the sampler's name may hold the schedule.
    """
    if name is None:
        return None
    if name == AUTOMATIC:
        return AUTOMATIC_SCHEDULES.get(sampler)
    # A name that is not in the table may still be one of ours: the caller looks it up.
    by_name = {theirs: ours for ours, theirs in SCHEDULE_NAMES.items()}
    return by_name.get(name, name)
