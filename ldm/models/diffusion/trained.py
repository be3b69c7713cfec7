"""Which parameters a training changes, at what rate and for how long."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import nn

from ldm.config import RunConfig
from ldm.errors import ParameterError, UserError, nearest
from ldm.modules.adapters import (
    TEXT_LAYERS,
    UNET_LAYERS,
    LoraOptions,
    adaptable_weights,
    add_adapters,
)
from ldm.optim.registry import Part

ADAPTER = ".lora_"  # what follows a layer's name in those of its adapters' parameters


@dataclass(frozen=True)
class TextEncoderTraining:
    """How the text encoder's training differs from the UNet's.

    Args:
        lr: its learning rate; None for the UNet's.
        stop: the number of optimizer steps after which its weights stay; None for never.
    """

    lr: float | None = None
    stop: int | None = None

    def scaled(self, *factors: int) -> TextEncoderTraining:
        """Return the same with another learning rate, if it has its own."""
        # `scale_lr` scales all rates alike, so that their ratio stays.
        return self if self.lr is None else replace(self, lr=math.prod(factors, start=self.lr))

    def check(self, trainable: bool) -> None:
        """Raise a `UserError` for values out of range, or for any if no text encoder trains."""
        for name, value in (("lr", self.lr), ("stop", self.stop)):
            if value is None:
                continue
            if not trainable:
                raise ParameterError(f"text_encoder_{name}", "needs cond_stage_trainable: true")
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                problem = f"expected a positive number, got {value!r}"
                raise ParameterError(f"text_encoder_{name}", problem)
        if self.stop is not None and int(self.stop) != self.stop:
            problem = f"expected a number of steps, got {self.stop!r}"
            raise ParameterError("text_encoder_stop", problem)


def check_strategy(strategy: Strategy) -> None:
    """Raise a `UserError` if processes wait for gradients of all that was trained at the start."""
    if not isinstance(strategy, DDPStrategy):
        return
    # In each backward pass DDP waits for every parameter that had a gradient at the start. After
    # `text_encoder_stop` those of the text encoder never come.
    if not strategy._ddp_kwargs.get("find_unused_parameters"):
        problem = "needs --strategy ddp_find_unused_parameters_true with ddp"
        raise ParameterError("text_encoder_stop", problem)


# What is trained


def parts_to_train(
    unet: nn.Module, text_encoder: nn.Module | None, text_lr: float | None
) -> Sequence[Part]:
    """Return what an optimizer gets: two groups if the text encoder has its own rate, else one.

    Args:
        text_encoder: None if it is not trained.
    """
    # Groups only where rates differ: a checkpoint's optimizer has to find as many again.
    if text_encoder is None:
        return [unet]
    if text_lr is None:
        return [unet, text_encoder]
    return [
        {"name": "unet", "modules": [unet]},
        {"name": "text_encoder", "modules": [text_encoder], "lr": text_lr},
    ]


def group_names(parts: Sequence[Part]) -> list[str | None]:
    """Return the names of parameter groups; None for one that has none."""
    return [part.get("name") if isinstance(part, Mapping) else None for part in parts]


def names_to_freeze(
    model: nn.Module, patterns: Sequence[str], adapted: Mapping[str, Sequence[str]] | None
) -> set[str]:
    """Return the names of the parameters that `freeze` takes out of a model's training.

    Args:
        adapted: the networks that get adapters, and the endings of their layers' names; None
            without adapters. With them the names are those of the weights that they change.
    """
    names = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = {name for name, trains in names.items() if trains}
    # The adapters are not there yet, so the patterns go by the weights that will get one.
    if adapted is not None:
        trained = set()
        for prefix, endings in adapted.items():
            module = model.get_submodule(prefix)
            trained.update(adaptable_weights(module, endings, f"{prefix}."))
    return fitting(patterns, trained, names.keys() - trained)


def fitting(
    patterns: Sequence[str], trained: Collection[str], others: Collection[str] = ()
) -> set[str]:
    """Return which of the trained parameters' names fit one of the patterns of `freeze`.

    Args:
        others: names of parameters that are not trained, for the error.

    Raises:
        UserError: a pattern fits no name, or all names are fitted.
    """
    is_list = isinstance(patterns, (list, tuple))
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        raise ParameterError("freeze", f"expected a list of patterns, got {patterns!r}")
    found: set[str] = set()
    # A pattern that fits nothing is most likely a typing error, and would have no effect.
    for pattern in patterns:
        new = {name for name in trained if fnmatchcase(name, pattern)}
        if not new:
            problem = f"'{pattern}' fits {_why_nothing(pattern, trained, others)}"
            raise ParameterError("freeze", problem)
        found |= new
    if found and len(found) == len(trained):
        raise ParameterError("freeze", f"{', '.join(patterns)}: nothing is left to train")
    return found


def _why_nothing(pattern: str, trained: Collection[str], others: Collection[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in others):
        return "only parameters that are not trained anyway: leave it out"
    return f"no trained parameter{nearest(pattern, set(trained))}"


def freeze_parameters(module: nn.Module, names: Collection[str]) -> None:
    """Take parameters out of the training; adapters go by the name of the weight they change."""
    for name, parameter in module.named_parameters():
        # The adapter `x.lora_A.default.weight` changes the weight `x.weight`.
        layer, found, _ = name.partition(ADAPTER)
        weight = f"{layer}.weight" if found else name
        if weight in names:
            parameter.requires_grad_(False)


def layers_to_adapt(text_encoder_trains: bool) -> dict[str, Sequence[str]]:
    """Return the networks that `lora` adapts, and how the names of their layers end."""
    layers: dict[str, Sequence[str]] = {"model.diffusion_model": UNET_LAYERS}
    if text_encoder_trains:
        layers["cond_stage_model"] = TEXT_LAYERS
    return layers


def adapt(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    options: LoraOptions,
    frozen: Collection[str],
) -> None:
    """Train adapters on some layers of a model instead of its weights.

    Args:
        layers: the networks that get adapters, and the endings of their layers' names.
        frozen: weights whose adapters are not trained.
    """
    # LoRA (Hu et al., 2106.09685): the weights stay as they are, and low-rank changes to them are
    # trained.
    model.requires_grad_(False)
    for network, endings in layers.items():
        add_adapters(model.get_submodule(network), endings, options)
    freeze_parameters(model, frozen)


def stop_training(module: nn.Module) -> None:
    """Leave a network as it is from here on: what has no gradient, every optimizer leaves alone."""
    module.requires_grad_(False).eval()
    # A gradient that is left from before would still be applied once.
    for parameter in module.parameters():
        parameter.grad = None


# Going on from a checkpoint


def check_same_parameters(
    checkpoint: Mapping[str, Any],
    groups: Sequence[str | None],
    count: int,
    patterns: Sequence[str],
) -> None:
    """Raise a `UserError` if a checkpoint's optimizer has other groups, or not `count` parameters.

    Args:
        groups: their names; None for the only one, which has none. What an optimizer adds behind a
            `-` does not count.
        patterns: of what is frozen, which is compared with the checkpoint's own config where it has
            one.
    """
    states = checkpoint.get("optimizer_states") or []
    # There is nothing to compare in a file that holds weights alone.
    if len(states) != 1 or "param_groups" not in states[0]:
        return
    saved = states[0]["param_groups"]
    # An optimizer's state has no parameter names. What can be compared are its groups, the number
    # of their tensors, and the patterns that the run was started with.
    names = {_plain_name(group.get("name")) for group in saved}
    found = sum(len(group["params"]) for group in saved)
    frozen = _saved_patterns(checkpoint, patterns)
    if names != set(groups) or found != count or sorted(frozen) != sorted(patterns):
        raise UserError(
            f"the checkpoint to go on from trains {found} tensors in {_listed(names)}, this config "
            f"{count} in {_listed(set(groups))}: cond_stage_trainable, lora, freeze and "
            "text_encoder_lr of model.params have to stay as they were; or start a new run "
            "from its "
            "weights with --actual_resume"
        )


def _plain_name(name: str | None) -> str | None:
    """Return a group's name without the kind that an optimizer put behind it."""
    return None if name is None else str(name).partition("-")[0]


def _saved_patterns(checkpoint: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """Return what the checkpoint's config freezes; the default where it has no config."""
    before = RunConfig(checkpoint.get("config") or {})
    known = bool(before.section("model.params"))
    return before.get("model.params.freeze", []) if known else default


def _listed(groups: set[str | None]) -> str:
    named = sorted(name for name in groups if name)
    return f"the groups {', '.join(named)}" if named else "one group"


def clips_scaled(trainer: Any) -> bool:
    """Return whether Lightning has to unscale fp16's gradients to clip them.

    Fused kernels would unscale them once more.
    """
    # Only fp16 scales its loss; other precisions have gradients of the true size.
    if trainer is None or trainer.precision != "16-mixed":
        return False
    return bool(trainer.gradient_clip_val)
