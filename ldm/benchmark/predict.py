"""The memory that a training will need on its device, and what the engine would choose there, from
its config alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ldm.benchmark.reference import accumulated, autocast_dtype, has_prior
from ldm.benchmark.variants import Variant
from ldm.config import RunConfig
from ldm.errors import UserError, under
from ldm.host import CUDA
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training import engine
from ldm.training.build_trainer import needs_gradients
from ldm.training.facts import KEYS, Needs, trained_bytes, twin_of
from ldm.training.memory import GB, Estimate, available_bytes, estimate

COLUMNS = ("", "weights", "optimizer", "gradients", "activations", "both at once", "GB")


def predict(
    config: Mapping[str, Any], places: Sequence[tuple[str, int | None]] = (("cpu", None),)
) -> list[tuple[Estimate, str]]:
    """Estimate the memory of a config's training step, as the engine would have it in some places.

    The weights take no memory here.

    Args:
        places: the kind of each device, as torch names it, and the bytes that it has for a
            training; None if that is not known.

    Returns:
        for each place the estimate, and a line that says what was chosen and why.

    Raises:
        UserError: images of any size, or another model than `LatentDiffusion`.
    """
    model = twin_of(config)
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"model.target: {config['model']['target']}: an estimate is for LatentDiffusion"
        )
    if not RunConfig(config).get("data.params.train.params.size"):
        raise UserError("data.params.train.params.size: needed for an estimate")
    kinds = {device for device, _ in places}
    needs = {kind: Needs(lambda: model, partial(_estimate, config, kind)) for kind in kinds}
    found = []
    for device, memory in places:
        needed = needs[device]
        choices = engine.choose(_facts(config, model, device, memory, needed))
        values = {choice.key: choice.value for choice in choices}
        estimated = needed.estimate(values[engine.RECOMPUTE], values[engine.OPTIMIZER])
        assert estimated is not None
        found.append((estimated, engine.in_one_line(choices)))
    return found


def _estimate(config: Mapping[str, Any], device: str, model: LatentDiffusion) -> Estimate:
    data = config["data"]["params"]
    samples, size = data["batch_size"] * (1 + has_prior(config)), data["train"]["params"]["size"]
    accumulates = accumulated(config) > 1
    with under("model.params"):
        return estimate(
            *(model, model.optimizer, samples, size, autocast_dtype(config), accumulates, device)
        )


def _facts(
    config: Mapping[str, object],
    model: LatentDiffusion,
    device: str,
    memory: int | None,
    needed: Needs,
) -> engine.Facts:
    asked = RunConfig(config)
    trainer = SimpleNamespace(
        accumulate_grad_batches=accumulated(config),
        gradient_clip_val=asked.get("lightning.trainer.gradient_clip_val"),
        precision=asked.get("lightning.trainer.precision", "32-true"),
        world_size=_processes(asked.get("lightning.trainer.devices", 1)),
    )
    return engine.Facts(
        device=device,
        weights=sum(p.nbytes for p in [*model.parameters(), *model.buffers()]),
        trained=trained_bytes(model),
        given={key: asked.get(key) for key in KEYS},
        memory=memory,
        needed=needed,
        images=None,
        needs_gradients=needs_gradients(trainer),
    )


def _processes(devices: object) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return devices if isinstance(devices, int) and devices > 0 else 1


def this_device() -> tuple[str, int | None]:
    """Return the kind of the device that a training would run on, and its free memory."""
    kind = CUDA if torch.cuda.is_available() else "cpu"
    return kind, available_bytes(torch.device(kind))


def predicted(variants: Sequence[Variant], cards: Sequence[float] = ()) -> tuple[dict, str]:
    """Return the estimates of several configs, as figures in bytes and as a table in GB.

    Args:
        cards: GB of GPUs, on each of which every config is estimated; none for this machine.

    Returns:
        `estimates` and `choices`, by the names of their rows; and the table, below which a line for
        each row says what the engine would choose.
    """
    names = [f", {card:g} GB" for card in cards] or [""]
    places: list[tuple[str, int | None]] = [this_device()]
    if cards:
        places = [(CUDA, int(card * 2**30)) for card in cards]
    found = {
        variant.name + name: told
        for variant in variants
        for name, told in zip(names, predict(variant.config, places))
    }
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    for name, (e, _) in found.items():
        cells = (e.weights, e.optimizer, e.gradients, e.activations, e.shared, e.total)
        lines.append(f"| {name} | {' | '.join(f'{cell / GB:.2f}' for cell in cells)} |")
    said = [f"{name}: {text}" for name, (_, text) in found.items()]
    figures = {
        "estimates": {name: {**vars(e), "total": e.total} for name, (e, _) in found.items()},
        "choices": {name: text for name, (_, text) in found.items()},
    }
    return figures, "\n".join([*lines, "", *said])
