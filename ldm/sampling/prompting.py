"""What a model reads of prompts, and how it is guided towards them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import with_beside
from ldm.models.diffusion.guidance import Guidance, Interval, Projection, Rescale
from ldm.modules.encoders.t5 import FrozenT5Embedder
from ldm.modules.encoders.weighting import A1111, WEIGHTINGS, WeightedText

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Beside, Cond
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling.text_to_image import Recipe


class Guided(Protocol):
    """What says how to guide: a `Recipe`, or the flags of a command."""

    @property
    def rescale(self) -> Any:
        """Return the share that `Rescale` takes."""

    @property
    def interval(self) -> Any:
        """Return the two noise levels of `Interval`, or None."""

    @property
    def apg(self) -> Any:
        """Return the numbers that `Projection` takes, or None."""


@dataclass(frozen=True)
class Texts:
    """The embeddings of prompts, those that guidance leads away from, and what changes guidance."""

    cond: Cond
    uncond: Cond | None
    guidance: Guidance

    def beside(self, read: Beside | None) -> Texts:
        """Return the same with what the UNet reads beside the noisy latent and the text, if any."""
        if read is None:
            return self
        # Both texts read the same: guidance leads away from a text, not from a picture.
        uncond: Any = self.uncond
        uncond = None if uncond is None else with_beside(uncond, read)
        cond: Any = self.cond
        return replace(self, cond=with_beside(cond, read), uncond=uncond)


def guidance_of(how: Guided, guide: LatentDiffusion | None = None) -> Guidance:
    """Return what changes classifier-free guidance.

    Raises:
        UserError: a value that means nothing.
    """
    # Each is left out unless it was asked for, so that the plain formula stays as it was.
    rescale = Rescale(how.rescale) if how.rescale else None
    interval = None if how.interval is None else Interval(*how.interval)
    projection = None if how.apg is None else Projection(*how.apg)
    # The weak model, whose prediction is led away from, in place of the empty prompt.
    weak = None if guide is None else guide.apply_model
    return Guidance(rescale, interval, projection, weak)


def read_prompts(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str,
    recipe: Recipe,
    guide: LatentDiffusion | None = None,
) -> Texts:
    """Return the embeddings of prompts, and of the negative prompt once for each of them.

    A scale of 1 is no guidance, and needs no negative prompt. A guide reads that prompt itself.
    """
    # Without guidance the model runs on the prompt alone, so one embedding is enough.
    guidance = guidance_of(recipe, guide)
    if recipe.scale == 1.0:
        return Texts(_embed(model, prompts, recipe.weighting), None, guidance)
    # Guidance leads away from one text, the same for each prompt.
    negatives = [negative_prompt] * len(prompts)
    if guide is None and recipe.weighting is not None:
        # One pass of the model takes both, so they have to be of one length.
        both = _embed(model, [*prompts, *negatives], recipe.weighting)
        cond, uncond = both.chunk(2)
        return Texts(cond, uncond, guidance)
    # A guide has a text encoder of its own, which may have been tuned apart from this one.
    cond = _embed(model, prompts, recipe.weighting)
    return Texts(cond, _embed(guide or model, negatives, recipe.weighting), guidance)


def _embed(model: LatentDiffusion, prompts: Sequence[str], weighting: str | None) -> Tensor:
    """Return embeddings of prompts; those of before where `read_ahead` keeps them."""
    known = model.known_texts
    if known is None:
        return _computed(model, prompts, weighting)
    key = tuple(prompts), weighting
    if key not in known:
        known[key] = _computed(model, prompts, weighting)
    return known[key]


def _computed(model: LatentDiffusion, prompts: Sequence[str], weighting: str | None) -> Tensor:
    # As trained: plain words, and the encoder cuts what is too long.
    if weighting is None:
        return model.get_learned_conditioning(prompts)
    # With weights: longer prompts are read in pieces.
    if weighting != A1111:
        accepted = ", ".join(WEIGHTINGS)
        raise UserError(f"weighting: unknown '{weighting}'; accepted: {accepted}")
    if isinstance(model.cond_stage_model, FrozenT5Embedder):
        raise UserError(f"weighting {A1111}: is for CLIP's text encoders, and this model has a T5")
    return WeightedText(model.cond_stage_model)(prompts)
