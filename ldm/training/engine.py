"""What a run switches on by itself: what is faster, changes no number, and fits here.

`choose` is a function of `Facts` alone. A key that the config has is always the user's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.optim.in_backward import SUFFIX

GB = 1e9
AUTO = "auto"  # a config's word for what the engine is to choose

LATENTS = "data.params.latent_cache"
OPTIMIZER = "model.params.optimizer"
RECOMPUTE = "model.params.unet_config.params.use_checkpoint"
LAYOUT = "model.params.unet_config.params.channels_last"

# What is recomputed in the backward pass, from the fastest to what needs least memory.
RECOMPUTED: dict[bool | str, str] = {
    False: "nothing recomputed",
    "attention": "attention recomputed",
    True: "all blocks recomputed",
}
# Below this size of the weights, in bytes, memory is of no concern, and a call of an optimizer for
# each tensor takes longer than it saves.
LARGE = 1e9
# A step takes more than its estimate: what kernels need for a moment, and the driver. Measured on a
# CPU were 2 to 4 % (docs/benchmarks.md).
SLACK, RESERVE = 1.1, 1e9
CACHE_SHARE = 0.25  # of the free memory that cached latents may take


@dataclass(frozen=True)
class Images:
    """What the cache of latents would hold, and what the steps would encode without it.

    Args:
        variants: pictures to encode once, with those that are mirrored.
        draws: pictures that the steps read; None for a run without an end.
        nbytes: of all cached latents.
        free: bytes of the memory that they would lie in; None where the system does not say.
    """

    variants: int
    draws: int | None
    nbytes: int
    free: int | None


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Args:
        device: its kind, as torch names it.
        weights: bytes of the model's weights.
        trained: bytes of those that are trained.
        given: what the config says of the engine's keys.
        memory: bytes that the training may take of its device; None where it does not say.
        needed: what a step needs, by what is recomputed and the optimizer.
        images: what would be cached, or why nothing can be; None before the images are known.
        needs_gradients: settings that need all gradients at once.
        sharded: whether the weights are spread over processes, so that nothing can be estimated.
        settled: keys that an earlier start of the run has chosen, with their values.
        resumes: whether the run goes on. What its first start left open stays as it was.
    """

    device: str
    weights: int
    trained: int
    given: Mapping[str, Any]
    memory: int | None
    needed: Callable[[bool | str, str], int]
    images: Images | str | None
    needs_gradients: Sequence[str] = ()
    sharded: bool = False
    settled: Mapping[str, Any] | None = None
    resumes: bool = False


@dataclass(frozen=True)
class Choice:
    """What one key is to be, and a phrase that says so, with the reason.

    `chosen` is false for what the config says, or what stays as it would be without the engine.
    """

    key: str
    value: Any
    text: str
    chosen: bool = True


def choose(facts: Facts) -> list[Choice]:
    """Return what each key of the engine is to be."""
    optimizer = _optimizer(facts)
    return [_latents(facts), optimizer, _recomputation(facts, optimizer.value), _layout(facts)]


def in_one_line(choices: Sequence[Choice]) -> str:
    """Say what was chosen and why."""
    return "; ".join(choice.text for choice in choices if choice.text)


def _settled(facts: Facts, key: str, default: object) -> Choice | None:
    """Return the choice that the config, or the run's first start, has made of a key."""
    given = facts.given.get(key)
    if key == RECOMPUTE and given == AUTO:
        return None
    name = key.rpartition(".")[2]
    if key in (facts.settled or {}):
        return Choice(key, given, f"{name} {_shown(given)} as before")
    if given is not None:
        return Choice(key, given, f"{name} {_shown(given)} as given", chosen=False)
    return Choice(key, default, "", chosen=False) if facts.resumes else None


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _latents(facts: Facts) -> Choice:
    """Encode each picture once, where the steps would encode more of them."""
    images = facts.images
    settled = _settled(facts, LATENTS, None)
    if settled:
        return settled
    if images is None:
        return Choice(LATENTS, None, "latents cached or not, by the images", chosen=False)
    if isinstance(images, str):
        return Choice(LATENTS, None, f"latents not cached ({images})", chosen=False)
    reads = "the steps have no end" if images.draws is None else f"the steps read {images.draws}"
    if images.draws is not None and images.variants > images.draws:
        why = f"{images.variants} pictures to encode, and {reads}"
        return Choice(LATENTS, None, f"latents not cached ({why})", chosen=False)
    if images.free is not None and images.nbytes > CACHE_SHARE * images.free:
        why = f"they take {images.nbytes / GB:.2f} of {images.free / GB:.1f} GB"
        return Choice(LATENTS, None, f"latents not cached ({why})", chosen=False)
    why = f"{images.variants} pictures encoded once, {reads}"
    return Choice(LATENTS, True, f"latents cached ({why})")


def _optimizer(facts: Facts) -> Choice:
    """Update each weight of a large model as soon as its gradient is there."""
    settled = _settled(facts, OPTIMIZER, "adamw")
    keeps = f"AdamW after the backward pass ({', '.join(facts.needs_gradients)})"
    if settled and settled.chosen and facts.needs_gradients:
        return Choice(OPTIMIZER, str(settled.value).removesuffix(SUFFIX), keeps)
    if settled:
        return settled
    if facts.trained < LARGE:
        why = f"{facts.trained / GB:.2f} GB are trained"
        return Choice(OPTIMIZER, "adamw", f"AdamW after the backward pass ({why})", chosen=False)
    if facts.needs_gradients:
        return Choice(OPTIMIZER, "adamw", keeps, chosen=False)
    less = f"{facts.trained / GB:.1f} GB of gradients less"
    return Choice(OPTIMIZER, f"adamw{SUFFIX}", f"AdamW in the backward pass ({less})")


def _recomputation(facts: Facts, optimizer: str) -> Choice:
    """Recompute as little as the memory allows."""
    settled = _settled(facts, RECOMPUTE, False)
    if settled:
        return settled
    # The word `auto` is replaced in what a run saves, so that the run goes on as it began.
    asked = facts.given.get(RECOMPUTE) == AUTO
    if facts.sharded:
        return Choice(RECOMPUTE, True, f"{RECOMPUTED[True]} (sharded: nothing is estimated)")
    if facts.weights < LARGE:
        return Choice(RECOMPUTE, False, f"{RECOMPUTED[False]} (a small model)", chosen=asked)
    if facts.memory is None:
        return Choice(RECOMPUTE, True, f"{RECOMPUTED[True]} (its memory is not known)")
    there = facts.memory / GB
    for value, text in RECOMPUTED.items():
        needs = wanted(facts.needed(value, optimizer))
        why = f"{needs / GB:.1f} of {there:.1f} GB"
        if needs <= facts.memory:
            return Choice(RECOMPUTE, value, f"{text} ({why})", chosen=asked or value is not False)
    return Choice(RECOMPUTE, True, f"{RECOMPUTED[True]} (not even so it fits: {why})")


def wanted(estimate: int) -> int:
    """Return the bytes that are to be there for a step of an estimated size."""
    return int(SLACK * estimate + RESERVE)


def _layout(facts: Facts) -> Choice:
    """Put the channels innermost where that was measured to be faster: of a large UNet on a CPU."""
    settled = _settled(facts, LAYOUT, False)
    if settled:
        return settled
    if facts.device != "cpu" or facts.weights < LARGE:
        return Choice(LAYOUT, False, "", chosen=False)
    return Choice(LAYOUT, True, "channels last (a large UNet on a CPU)")
