"""Which parameters a training changes, at what rate and for how long."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ldm.config import RunConfig
from ldm.errors import ParameterError, UserError, nearest

ADAPTER = ".lora_"  # what follows a layer's name in those of its adapters' parameters


@dataclass(frozen=True)
class TextEncoderTraining:
    """How the text encoder's training differs from the UNet's.

    Args:
        lr: its learning rate; None for the UNet's.
        stop: the number of optimizer steps after which its weights stay as they are; None for never.
    """

    lr: float | None = None
    stop: int | None = None

    def scaled(self, *factors: int) -> TextEncoderTraining:
        """The same with another learning rate, if it has its own."""
        return self if self.lr is None else replace(self, lr=math.prod(factors, start=self.lr))

    def check(self, trainable: bool) -> None:
        """Raise a `UserError` for values out of range, or for any if the text encoder is not trained."""
        for name, value in (("lr", self.lr), ("stop", self.stop)):
            if value is None:
                continue
            if not trainable:
                raise ParameterError(f"text_encoder_{name}", "needs cond_stage_trainable: true")
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ParameterError(f"text_encoder_{name}", f"expected a positive number, got {value!r}")
        if self.stop is not None and int(self.stop) != self.stop:
            raise ParameterError("text_encoder_stop", f"expected a number of steps, got {self.stop!r}")


def check_strategy(strategy: Any) -> None:
    """Raise a `UserError` if processes wait for each other's gradients of all that was trained at the start."""
    from pytorch_lightning.strategies import DDPStrategy

    if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ParameterError("text_encoder_stop", "needs --strategy ddp_find_unused_parameters_true with ddp")


def fitting(patterns: Sequence[str], trained: Collection[str], others: Collection[str] = ()) -> set[str]:
    """Which of the trained parameters' names fit one of the patterns of `model.params.freeze`.

    Args:
        others: names of parameters that are not trained, for the error.

    Raises:
        UserError: a pattern fits no name, or all names are fitted.
    """
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ParameterError("freeze", f"expected a list of patterns, got {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        new = {name for name in trained if fnmatchcase(name, pattern)}
        if not new:
            raise ParameterError("freeze", f"'{pattern}' fits {_why_nothing(pattern, trained, others)}")
        found |= new
    if found and len(found) == len(trained):
        raise ParameterError("freeze", f"{', '.join(patterns)}: nothing is left to train")
    return found


def _why_nothing(pattern: str, trained: Collection[str], others: Collection[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in others):
        return "only parameters that are not trained anyway: leave it out"
    return f"no trained parameter{nearest(pattern, set(trained))}"


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """Take parameters out of the training; those of adapters go by the name of the weight that they change."""
    for name, parameter in module.named_parameters():
        layer, found, _ = name.partition(ADAPTER)
        if (f"{layer}.weight" if found else name) in names:
            parameter.requires_grad_(False)


def check_same_parameters(
    checkpoint: Mapping[str, Any], groups: Sequence[str | None], count: int, patterns: Sequence[str]
) -> None:
    """Raise a `UserError` if a checkpoint's optimizer is not one of these groups with `count` parameters in all.

    Args:
        groups: their names; None for the only one, which has none. What an optimizer adds behind a `-` does not count.
        patterns: of what is frozen, which is compared with the checkpoint's own config where it has one.
    """
    states = checkpoint.get("optimizer_states") or []
    if len(states) != 1 or "param_groups" not in states[0]:
        return
    saved = states[0]["param_groups"]
    names = {None if (name := group.get("name")) is None else str(name).partition("-")[0] for group in saved}
    found = sum(len(group["params"]) for group in saved)
    before = RunConfig(checkpoint.get("config") or {})
    known = bool(before.section("model.params"))
    frozen = sorted(before.get("model.params.freeze", [])) if known else sorted(patterns)
    if names != set(groups) or found != count or frozen != sorted(patterns):
        raise UserError(
            f"the checkpoint to go on from trains {found} tensors in {_listed(names)}, this config {count} in "
            f"{_listed(set(groups))}: cond_stage_trainable, lora, freeze and text_encoder_lr of model.params have to "
            "stay as they were; or start a new run from its weights with --actual_resume"
        )


def _listed(groups: set[str | None]) -> str:
    named = sorted(name for name in groups if name)
    return f"the groups {', '.join(named)}" if named else "one group"
