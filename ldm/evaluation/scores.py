"""The scores of a subject's pictures: DINO, CLIP-I, CLIP-T, PRES and DIV (Ruiz et al., 4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.encoders import Encoders
from ldm.evaluation.intervals import Estimate, estimate
from ldm.evaluation.metrics import similarity, similarity_within
from ldm.evaluation.protocols import ONE, REMOVED, Protocol, without_identifier

# Of each score, whether more is better, and what it says.
SCORES = {
    "DINO": (True, "likeness to the subject's photos"),
    "CLIP-I": (True, "likeness to the subject's photos"),
    "CLIP-T": (True, "likeness to the prompt"),
    "PRES": (False, "likeness of pictures of the class to the subject's photos"),
    "DIV": (True, "difference of pictures of one prompt"),
}
# What a training took, where it was measured.
COSTS = {
    "seconds": (False, "of all optimizer steps"),
    "GB": (False, "the most memory in use: the GPU's, or the process's"),
}
MEASURED = SCORES | COSTS
REAL = "real images"


@dataclass(frozen=True)
class Group:
    """The pictures of one subject and seed, and what they are compared with.

    Args:
        pictures: the generated ones.
        prompts: of each; None where they are not known.
        real: the subject's photos.
        of_class: generated pictures of the class, for PRES.
    """

    subject: str
    pictures: Sequence[Image.Image]
    prompts: Sequence[str] | None
    real: Sequence[Image.Image]
    of_class: Sequence[Image.Image] = ()
    seed: str = ""


@dataclass(frozen=True)
class Scored:
    """The scores of all groups, with what pins them."""

    protocol: str
    hashes: Mapping[str, str]
    # Of each: subject, seed ("" for what no training has made), and a key a score or cost.
    rows: list[dict[str, object]] = field(default_factory=list)

    def estimates(self) -> dict[str, Estimate]:
        """Return the mean and interval of each score and cost over subjects and seeds."""
        return {
            name: estimate(values)
            for name in MEASURED
            if (values := self._by_subject(name)) is not None
        }

    def against(self, other: Scored) -> dict[str, Estimate]:
        """Return the mean and interval of each score and cost less the other's, by pairs.

        A pair is one subject with one seed. A row without a seed, as of a base model, stands beside
        all seeds of its subject.
        """
        pairs = [
            (row, each)
            for row, each in itertools.product(self.rows, other.rows)
            if row["subject"] == each["subject"]
            and (row["seed"] == each["seed"] or "" in (row["seed"], each["seed"]))
        ]
        found = {}
        for name in MEASURED:
            values: dict[str, list[float]] = {}
            for row, each in pairs:
                ours, theirs = row.get(name), each.get(name)
                if isinstance(ours, float) and isinstance(theirs, float):
                    values.setdefault(str(row["subject"]), []).append(ours - theirs)
            if values:
                found[name] = estimate(values)
        return found

    def _by_subject(self, name: str) -> dict[str, list[float]] | None:
        found: dict[str, list[float]] = {}
        for row in self.rows:
            value = row.get(name)
            if isinstance(value, float):
                found.setdefault(str(row["subject"]), []).append(value)
        return found or None


def score_group(
    group: Group, encoders: Encoders, protocol: Protocol, identifier: str = "sks"
) -> dict[str, float]:
    """Return every score that a group's pictures and these encoders give.

    Args:
        identifier: what the protocol takes out of the prompts of CLIP-T, if it does.

    Raises:
        UserError: other numbers of pictures than the protocol asks for.
    """
    _check_numbers(group, protocol)
    scores: dict[str, float] = {}
    if encoders.dino is not None:
        real = encoders.dino(group.real)
        scores["DINO"] = similarity(encoders.dino(group.pictures), real)
        if group.of_class:
            scores["PRES"] = similarity(encoders.dino(group.of_class), real)
    if encoders.clip_image is not None:
        shown = encoders.clip_image(group.pictures)
        scores["CLIP-I"] = similarity(shown, encoders.clip_image(group.real))
        if group.prompts is not None and encoders.clip_text is not None:
            texts = _texts(group.prompts, protocol, identifier)
            said = dict(zip(sorted(set(texts)), encoders.clip_text(sorted(set(texts)))))
            wanted = torch.stack([said[text] for text in texts])
            scores["CLIP-T"] = float((shown * wanted).sum(-1).double().mean())
    if encoders.distance is not None and group.prompts is not None:
        diversity = _diversity(group, encoders)
        if diversity is not None:
            scores["DIV"] = diversity
    return scores


def score_real(real: Sequence[Image.Image], encoders: Encoders) -> dict[str, float]:
    """Return what a subject's photos score among themselves: pairs of different photos.

    It is the paper's row of real images: what a method could reach.
    """
    if len(real) < 2:
        return {}
    found = {"DINO": encoders.dino, "CLIP-I": encoders.clip_image}
    return {name: similarity_within(encode(real)) for name, encode in found.items() if encode}


def _texts(prompts: Sequence[str], protocol: Protocol, identifier: str) -> list[str]:
    if protocol.identifier != REMOVED:
        return list(prompts)
    return [without_identifier(prompt, identifier) for prompt in prompts]


def _diversity(group: Group, encoders: Encoders) -> float | None:
    """Return the mean over prompts of the mean distance over pairs of a prompt's pictures."""
    assert encoders.distance is not None and group.prompts is not None
    by_prompt: dict[str, list[Image.Image]] = {}
    for prompt, picture in zip(group.prompts, group.pictures, strict=True):
        by_prompt.setdefault(prompt, []).append(picture)
    means = []
    for pictures in by_prompt.values():
        pairs = list(itertools.combinations(pictures, 2))
        if pairs:
            first, second = zip(*pairs)
            means.append(float(encoders.distance(first, second).double().mean()))
    return sum(means) / len(means) if means else None


def _check_numbers(group: Group, protocol: Protocol) -> None:
    """Raise a `UserError` where a protocol's name would stand over something else."""
    name = f"{group.subject}: the protocol '{protocol.name}'"
    custom = "; the protocol custom takes any number"
    if not group.pictures or not group.real:
        raise UserError(f"{group.subject}: no pictures to compare")
    if protocol.pairing == ONE and len(group.real) != 1:
        raise UserError(
            f"{name} compares with one reference picture a subject, and there are "
            f"{len(group.real)}: leave one in its folder, or take another protocol"
        )
    if group.prompts is None or protocol.images is None:
        return
    counts = {prompt: group.prompts.count(prompt) for prompt in set(group.prompts)}
    for prompt, count in sorted(counts.items()):
        if count != protocol.images:
            raise UserError(
                f"{name} asks for {protocol.images} pictures of each prompt, and of {prompt!r} "
                f"there are {count}{custom}"
            )
