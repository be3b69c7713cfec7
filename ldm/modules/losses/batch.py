"""A training batch: examples of the subject and, with prior preservation, examples of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

# What a data loader yields: the subject's entries, or those of the subject and those of the prior.
RawBatch = Mapping[str, Any] | Sequence[Mapping[str, Any]]

NAMES = ("subject", "prior")


def named_parts(batch: RawBatch) -> dict[str, Any]:
    """Return the parts of a data loader's batch by name: `subject` and, if it has one, `prior`."""
    return dict(zip(NAMES, [batch] if isinstance(batch, Mapping) else batch))


@dataclass(frozen=True)
class Examples:
    """One part of a batch. It has `images`, or `moments` in their place.

    Args:
        captions: one for each example.
        images: in [-1, 1].
        moments: the autoencoder's posterior of each image, from a latent cache.
        masks: how much each place counts, from 0 to 1, at the size of the images or of their
            latents; None where all counts.
        seeds: of each example's random numbers; None to draw from torch's global generator.
        class_captions: the captions without the identifier; None where nothing says them.
        small: low-resolution images in [-1, 1], for a model that upscales; None where they are made
            of the images.
    """

    captions: Sequence[str]
    images: Float[Tensor, "b height width 3"] | None = None
    moments: Float[Tensor, "b z2 h w"] | None = None
    masks: Float[Tensor, "b _ _"] | None = None
    seeds: Sequence[int] | Tensor | None = None
    class_captions: Sequence[str] | None = None
    small: Float[Tensor, "b _ _ 3"] | None = None

    @classmethod
    def of(
        cls, entries: Mapping[str, Any], image_key: str, caption_key: str, small_key: str = ""
    ) -> Examples:
        """Read a dataset's entries, of which a config names images and caption."""
        return cls(
            captions=list(entries[caption_key]),
            images=entries.get(image_key),
            moments=entries.get("moments"),
            masks=entries.get("mask"),
            seeds=entries.get("noise_seed"),
            class_captions=entries.get("class_caption"),
            small=entries.get(small_key),
        )

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> Examples:
        """Return the first `count` examples, or all if there are fewer."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value[:count] for name, value in present.items()})


@dataclass(frozen=True)
class Batch:
    """The subject's examples and, if there are any, the prior's (Ruiz et al., 2208.12242).

    The only code that knows how a batch holds the two. Every network runs once over both together,
    the subject's examples first.
    """

    subject: Examples
    prior: Examples | None = None

    @classmethod
    def of(
        cls,
        batch: RawBatch,
        image_key: str = "image",
        caption_key: str = "caption",
        small_key: str = "",
    ) -> Batch:
        """Read what a data loader yields."""
        count = 1 if isinstance(batch, Mapping) else len(batch)
        if not 1 <= count <= len(NAMES):
            raise ValueError(f"batch: expected one part, or a (subject, prior) pair, got {count}")
        parts = named_parts(batch)
        keys = image_key, caption_key, small_key
        return cls(**{name: Examples.of(part, *keys) for name, part in parts.items()})

    @property
    def parts(self) -> list[Examples]:
        """Return the parts that are there, the subject first."""
        return [self.subject] if self.prior is None else [self.subject, self.prior]

    @property
    def repeats_subject(self) -> bool:
        """Return whether the prior's examples are the subject's images once more."""
        if self.prior is None:
            return False
        pairs = [
            (self.subject.images, self.prior.images),
            (self.subject.moments, self.prior.moments),
        ]
        return all(first is second for first, second in pairs)

    @property
    def captions(self) -> list[str]:
        """Return the captions of all parts."""
        return [caption for part in self.parts for caption in part.captions]

    @property
    def images(self) -> Float[Tensor, "b 3 height width"] | None:
        """Return the images of all parts, channels first; None if a part has none."""
        return _channels_first([part.images for part in self.parts])

    @property
    def small(self) -> Float[Tensor, "b 3 _ _"] | None:
        """Return the small images of all parts, channels first; None if a part has none."""
        return _channels_first([part.small for part in self.parts])

    @property
    def moments(self) -> Float[Tensor, "b z2 h w"] | None:
        """Return the cached posteriors of all parts; None if a part has none."""
        return _joined([part.moments for part in self.parts])

    def first(self, count: int) -> Batch:
        """Return a batch of up to `count` examples of each part."""
        return Batch(*(part.first(count) for part in self.parts))

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut what was computed of all examples together back into the parts."""
        return list(torch.split(values, [len(part) for part in self.parts]))


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.cat(present) if len(present) == len(values) else None


def _channels_first(images: Sequence[Tensor | None]) -> Tensor | None:
    joined = _joined(images)
    return None if joined is None else rearrange(joined, "b h w c -> b c h w").contiguous()
