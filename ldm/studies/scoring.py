"""How a study scores what a run has learned: which prompts, which pictures, which protocol."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import IDENTIFIER
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import ParameterError, check_counts, under
from ldm.evaluation.encoders import Encoders, load_encoders
from ldm.evaluation.protocols import MINIATURE, Protocol, find_protocol
from ldm.evaluation.scores import Group, score_group
from ldm.models.diffusion.sampler_names import find_sampler
from ldm.sampling.text_to_image import Recipe
from ldm.studies.drawing import draw, series
from ldm.util import check_params

ENCODERS = ("dino", "clip", "lpips")


@dataclass(frozen=True)
class Scoring:
    """What is drawn and how it is scored.

    Args:
        protocol: its name.
        images: pictures of each prompt; by default the protocol's number, else 4.
        class_images: pictures of the class, for PRES; 0 for none.
        steps, scale, side, sampler: of the sampling; `side` in pixels.
        seed: of the pictures' noise.
        batch_size: pictures that are drawn at once.
        dino, clip, lpips: local weights of the encoders.
        encoders: which of `dino`, `clip` and `lpips` to use.
        device: of the sampling and the encoders. By default the best there is draws, and the CPU
            scores: the next training has the GPU's memory to itself.
    """

    protocol: str = "paper"
    images: int | None = None
    class_images: int = 0
    steps: int = 50
    scale: float = 7.5
    side: int = 512
    sampler: str = "ddim"
    seed: int = 42
    batch_size: int = 4
    dino: str | None = None
    clip: str | None = None
    lpips: str | None = None
    encoders: list[str] = field(default_factory=lambda: list(ENCODERS))
    device: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> Scoring:
        """Return the scoring that a mapping asks for; raise a `UserError` for unknown keys."""
        check_params(cls, given, where)
        scoring = cls(**given)
        scoring.rules()
        with under(where):
            scoring.check()
        return scoring

    def check(self) -> None:
        """Raise a `UserError` for what could not be drawn or scored, before anything is trained."""
        check_counts(steps=self.steps, side=self.side, batch_size=self.batch_size)
        if self.images is not None:
            check_counts(images=self.images)
        if self.class_images < 0:
            raise ParameterError("class_images", f"expected 0 or more, got {self.class_images}")
        names = self.encoders
        if not isinstance(names, list) or not set(names) <= set(ENCODERS):
            raise ParameterError("encoders", f"accepted: {', '.join(ENCODERS)}; got {names!r}")
        find_sampler(self.sampler)

    def rules(self) -> Protocol:
        """Return the protocol; another number of pictures than it asks for makes it custom."""
        protocol = find_protocol(self.protocol)
        if self.images is None or protocol.images is None:
            return protocol
        return protocol.having(images=self.images)

    def pinned(self) -> dict[str, str]:
        """Return what has to stand beside every score: the protocol, and the encoders' hashes."""
        hashes = self.load().hashes
        named = "; ".join(f"{name} {digits}" for name, digits in sorted(hashes.items()))
        return {"protocol": self.rules().name, "encoders": named}

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            self.steps, self.scale, 0.0, self.sampler, self.side, self.side, seed=self.seed
        )

    def load(self) -> Encoders:
        """Load the encoders, once for each process."""
        files = (self.dino, self.clip, self.lpips)
        return _load(self.rules(), files, tuple(self.encoders), self.device)

    def score(
        self,
        checkpoint: Path,
        photos: Path,
        prompts: Sequence[str],
        class_prompt: str,
        folder: Path,
        class_folder: Path,
        identifier: str = IDENTIFIER,
        texts: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Draw a checkpoint's pictures into folders, as far as they are missing; score them.

        Args:
            texts: what the pictures of each prompt should show, for CLIP-T; by default the prompt.
        """
        many = self.images or self.rules().images or 4
        shown = [text for text in texts or prompts for _ in range(many)]
        wanted = series(prompts, many, folder)
        of_class = series([class_prompt], self.class_images, class_folder)
        draw(checkpoint, [*wanted, *of_class], self.recipe, self.batch_size, self.device)
        group = Group(
            folder.name,
            [load_image(picture.path) for picture in wanted],
            shown,
            [load_image(path) for path in find_images(photos)],
            [load_image(picture.path) for picture in of_class],
        )
        return score_group(group, self.load(), self.rules(), identifier)


@functools.lru_cache(maxsize=1)
def _load(
    protocol: Protocol, files: tuple[str | None, ...], wanted: tuple[str, ...], device: str | None
) -> Encoders:
    if protocol.dino == MINIATURE.dino:
        from ldm.tiny.encoders import miniature_encoders

        return miniature_encoders(files[1])
    named = dict(zip(("dino", "clip", "lpips"), files))
    return load_encoders(protocol, named, wanted, device or "cpu")
