"""A panel: the same prompts from the same noise all through a run, so that drift is seen as it
happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from PIL import Image
from torch import nn

from ldm.errors import ParameterError
from ldm.modules.losses.batch import RawBatch
from ldm.sampling.contact_sheet import Entry, contact_sheet
from ldm.sampling.text_to_image import Recipe, image_seed, text_to_image
from ldm.util import check_mapping, check_params

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

NAME = "panel"  # the parameter of `ImageLogger`
UNRELATED = ("a photo of a car", "a photo of a house", "a photo of a tree")
WIDEST = 256  # pixels of a picture's side on the sheet


@runtime_checkable
class Summarized(Protocol):
    """A datamodule that says what a run trains on."""

    def summary(self) -> dict[str, Any]:
        """Return the prompts of subject and class, among other things."""


class Panel:
    """Which pictures a panel has.

    Args:
        prompts: its rows; by default the subject's prompt, the class's and two of `unrelated`.
        unrelated: prompts of other things; those that end in a word of the subject's or the class's
            are left out.
        images: pictures of each prompt; a column has the same noise in every row.
        seed: of the noise.
        steps, scale: of the sampler, DDIM without noise, and its guidance.
        every_n_steps: optimizer steps between panels, of which the first is before any; by default
            a panel comes with every other grid.

    Raises:
        UserError: no prompts, or a number below 1.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        unrelated: Sequence[str] = UNRELATED,
        images: int = 2,
        seed: int = 0,
        steps: int = 50,
        scale: float = 7.5,
        every_n_steps: int | None = None,
    ):
        for name, texts in (("prompts", prompts), ("unrelated", unrelated)):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts or ()):
                raise ParameterError(f"{NAME}.{name}", f"expected a list of prompts, got {texts!r}")
        if prompts is not None and not prompts:
            raise ParameterError(f"{NAME}.prompts", "none; write panel: null for no panel")
        for name, number in (
            ("images", images),
            ("steps", steps),
            ("every_n_steps", every_n_steps),
        ):
            if number is not None and number < 1:
                raise ParameterError(f"{NAME}.{name}", f"expected 1 or more, got {number}")
        self.given, self.unrelated = prompts, unrelated
        self.images, self.seed, self.steps, self.scale = images, seed, steps, scale
        self.every_n_steps = every_n_steps
        self._side: int | None = None

    def prompts(self, data: object) -> list[str]:
        """Return the rows for what a datamodule trains on; none if it does not say what that is."""
        if self.given is not None:
            return list(self.given)
        summary = data.summary() if isinstance(data, Summarized) else {}
        # The first that is not empty: some class images are of the empty prompt.
        # Of several subjects, each has its rows.
        known = [
            next(filter(None, own.get(f"{name}_prompts", [])), None)
            for own in summary.get("concepts") or [summary]
            for name in ("subject", "class")
        ]
        own = [prompt for prompt in known if prompt]
        words = {word for prompt in own for word in prompt.split()}
        others = [prompt for prompt in self.unrelated if prompt.split()[-1] not in words]
        return [*dict.fromkeys(own), *others[:2]] if own else []

    def size_as(self, model: LatentDiffusion, batch: RawBatch | None) -> None:
        """Draw pictures as large as a batch's, from now on."""
        if self._side is None:
            assert batch is not None, "at the end of a run the side is known"
            self._side = _side(model, batch)

    def draw(
        self, trainer: pl.Trainer, model: LatentDiffusion, batch: RawBatch | None
    ) -> Image.Image | None:
        """Draw the panel, with pictures as large as the first batch's; None without prompts.

        It draws nothing from torch's global generator. The EMA weights are used, if the model keeps
        any.
        """
        prompts = self.prompts(trainer.datamodule)  # type: ignore[attr-defined]
        if not prompts:
            return None
        self.size_as(model, batch)
        assert self._side is not None
        recipe = Recipe(self.steps, self.scale, height=self._side, width=self._side, seed=self.seed)
        seeds = [image_seed(self.seed, column) for column in range(self.images)]
        rows: list[tuple[str, Sequence[Entry]]] = []
        with trainer.precision_plugin.forward_context():
            for prompt in prompts:  # one at a time: a step's memory may have no room for more
                pictures = text_to_image(
                    model, [prompt] * self.images, seeds, recipe, may_fail=True
                )
                rows.append((prompt, pictures))
        return contact_sheet(rows, min(self._side, WIDEST), f"step {trainer.global_step}")


def make_panel(
    given: Mapping[str, object] | bool | None, sampling: Mapping[str, object]
) -> Panel | None:
    """Make the panel that `panel` asks for: true for the default one, false or null for none.

    `sampling` are the arguments of `log_images`, whose steps and guidance are the panel's if it has
    none of its own.
    """
    if given is None or given is False:
        return None
    options: Any = {} if given is True else given
    check_mapping(options, NAME)
    names = {"steps": "ddim_steps", "scale": "unconditional_guidance_scale"}
    options = {
        **{name: sampling[other] for name, other in names.items() if other in sampling},
        **options,
    }
    check_params(Panel, options, NAME)
    return Panel(**options)


def can_draw(model: nn.Module) -> bool:
    """Return whether a model makes pictures of text alone."""
    key = getattr(getattr(model, "model", None), "conditioning_key", None)
    return key in ("crossattn", "hybrid")  # one that inpaints does so where all is hidden


def _side(model: LatentDiffusion, batch: RawBatch) -> int:
    """Return the side of a batch's images, in pixels."""
    part = batch if isinstance(batch, Mapping) else batch[0]
    if "moments" in part:
        return part["moments"].shape[-1] * model.downsampling
    return part[model.first_stage_key].shape[1]
