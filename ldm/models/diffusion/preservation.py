"""Preservation: what keeps the model's idea of the class while it learns the subject.

Beside the subject's loss stands a second one, the prior's: loss = subject + reg_weight x prior. A
method says of which examples the prior's term is, and what the UNet's output is compared with.

| name | the term's examples | compared with |
|---|---|---|
| `class_images` | class images | their noise (DreamBooth, eq. 2) |
| `prior_prediction` | class images | the teacher's prediction |
| `dop` | the subject's, captioned as the class | the teacher's prediction |
| `blank` | the subject's, without a caption | the teacher's prediction |
| `none` | there is no term | |

The teacher is the model as it was before the training (`teacher.py`). `dop` is differential output
preservation: a noisy photo of the subject, called a dog, is denoised as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm.errors import ParameterError, nearest
from ldm.models.diffusion.teacher import PRECISIONS, AdaptersOff, FrozenCopy, Teacher
from ldm.modules.losses.batch import Batch
from ldm.util import check_mapping, check_params

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

NAME = "preservation"  # the parameter of `LatentDiffusion`


class Preservation:
    """A way to keep what the model knows of the class.

    This base is the paper's way: the prior's examples are the class images of the batch.
    """

    # Whether a batch may bring class images, and whether it must.
    takes_class_images = True
    needs_class_images = False
    # Whether the term compares with the model as it was before the training.
    needs_teacher = False
    # Whether the prior's examples are the subject's once more, with other captions.
    repeats_subject = False

    def with_prior(self, batch: Batch) -> Batch:
        """Return the batch with the examples whose loss is the prior's term."""
        return batch

    def has_prior(self, has_class_images: bool) -> bool:
        """Return whether a training has a prior's term."""
        return self.repeats_subject or (self.takes_class_images and has_class_images)


class ClassImages(Preservation):
    """Learn class images beside the subject's, as any image is learned (Ruiz et al., eq. 2)."""


class PriorPrediction(Preservation):
    """Keep, on class images, what the model predicted before the training."""

    needs_class_images = True
    needs_teacher = True


class OutputPreservation(Preservation):
    """Keep, on the subject's images with the class's captions, what the model predicted before."""

    takes_class_images = False
    needs_teacher = True
    repeats_subject = True

    def with_prior(self, batch: Batch) -> Batch:
        # The prior's copy has the subject's seeds, and so the same noise and time steps. It has no
        # mask: what the model does with the background is kept, too.
        subject = batch.subject
        return Batch(subject, replace(subject, captions=self.captions(batch), masks=None))

    def captions(self, batch: Batch) -> list[str]:
        """Return what the subject's examples are called in the prior's term."""
        if batch.subject.class_captions is None:
            raise ParameterError(
                NAME,
                "dop needs to know each caption without its identifier, which this dataset does "
                "not say (an entry class_caption): use ldm.data.personalized.PersonalizedBase",
            )
        return list(batch.subject.class_captions)


class BlankPreservation(OutputPreservation):
    """Keep the same for the empty caption, which guidance leads away from."""

    def captions(self, batch: Batch) -> list[str]:
        """Return empty captions."""
        return [""] * len(batch.subject)


class NoPreservation(Preservation):
    """Learn the subject alone."""

    takes_class_images = False

    def with_prior(self, batch: Batch) -> Batch:
        # Without a prior part, the loss is the subject's mean alone.
        return Batch(batch.subject)


# The methods hold no state, so one object of each serves every model. A new one is a line here.
PRESERVATIONS: dict[str, Preservation] = {
    "class_images": ClassImages(),
    "prior_prediction": PriorPrediction(),
    "dop": OutputPreservation(),
    "blank": BlankPreservation(),
    "none": NoPreservation(),
}


@dataclass(frozen=True)
class PreservationOptions:
    """What a config says of preservation.

    Args:
        method: a name in `PRESERVATIONS`.
        teacher: precision of the teacher's copy of the weights: fp32 (as the model's) or bf16,
            which needs half the memory. LoRA needs no copy.

    Raises:
        UserError: a name that is not known.
    """

    method: str = "class_images"
    teacher: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        for key, accepted in (("method", PRESERVATIONS), ("teacher", PRECISIONS)):
            value = getattr(self, key)
            if value not in accepted:
                hint = nearest(str(value), accepted)
                problem = f"unknown '{value}'{hint}; accepted: {', '.join(accepted)}"
                raise ParameterError(NAME if key == "method" else f"{NAME}.{key}", problem)

    @classmethod
    def of(cls, given: str | Mapping[str, Any]) -> PreservationOptions:
        """Read a method's name, or a mapping with these fields."""
        if isinstance(given, str):
            return cls(given)
        check_mapping(given, NAME)
        check_params(cls, given, NAME)
        return cls(**given)

    @property
    def chosen(self) -> Preservation:
        """Return the method."""
        return PRESERVATIONS[self.method]

    def teacher_of(self, model: LatentDiffusion) -> Teacher:
        """Return what knows how a model with its initial weights predicts."""
        return FrozenCopy(model, self.teacher) if model.lora is None else AdaptersOff()

    def copied_bytes(self, model: LatentDiffusion) -> int:
        """Return how large the teacher's copy of a model's weights is, or will be."""
        # With adapters the teacher is the model itself, with the adapters switched off.
        if not self.chosen.needs_teacher or model.lora is not None:
            return 0
        # A text encoder that does not train stays what it was, and needs no copy.
        trains = any(p.requires_grad for p in model.cond_stage_model.parameters())
        networks = [model.model, model.cond_stage_model] if trains else [model.model]
        size = sum(p.nbytes for network in networks for p in network.parameters())
        return size // 2 if self.teacher == "bf16" else size

    def check(self, reg_weight: float, has_adapters: bool, conditioning_key: str) -> None:
        """Raise a `UserError` for what does not go together."""
        # The teacher gets no mask and no masked image, which an inpainting model reads.
        if self.chosen.needs_teacher and conditioning_key != "crossattn":
            problem = f"{self.method} is for models that read text alone: use class_images"
            raise ParameterError(NAME, problem)
        if self.chosen.needs_teacher and reg_weight == 0:
            problem = f"{self.method} with a reg_weight of 0 preserves nothing: use none"
            raise ParameterError(NAME, problem)
        # A precision is said of a copy; where there is no copy, it would have no effect.
        if self.teacher == PRECISIONS[0]:
            return
        if has_adapters or not self.chosen.needs_teacher:
            why = (
                "with lora the teacher is the model itself"
                if has_adapters
                else (f"{self.method} has no teacher")
            )
            raise ParameterError(f"{NAME}.teacher", f"{self.teacher}: {why}: leave it out")

    def check_data(self, has_class_images: bool, unnamed: list[str]) -> None:
        """Raise a `UserError` for data that the method cannot work with.

        Args:
            unnamed: captions of the subject without its identifier.
        """
        # Class images that no term reads would only take time.
        if has_class_images and not self.chosen.takes_class_images:
            raise ParameterError(
                NAME,
                f"{self.method} uses no class images: leave out --reg_data_root, "
                "or choose class_images or prior_prediction",
            )
        if self.chosen.needs_class_images and not has_class_images:
            raise ParameterError(
                NAME, f"{self.method} needs class images: give --reg_data_root, or choose dop"
            )
        if self.method == "dop" and unnamed:
            raise ParameterError(
                NAME,
                f"dop keeps what captions mean without the identifier, but '{unnamed[0]}' has "
                "none: both of its terms would pull at one caption. Put the identifier into it",
            )

    def __str__(self) -> str:
        copied = f" (a copy in {self.teacher})" if self.teacher != PRECISIONS[0] else ""
        return f"{self.method}{copied}"
