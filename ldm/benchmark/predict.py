"""The memory that a training will need on its device, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.benchmark.reference import accumulated, autocast_dtype, has_prior
from ldm.benchmark.variants import Variant
from ldm.checkpoints.export import target_of
from ldm.config import RunConfig
from ldm.errors import UserError, under
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.memory import GB, Estimate, estimate
from ldm.util import instantiate_from_config

COLUMNS = ("", "weights", "optimizer", "gradients", "activations", "both at once", "GB")


def predict(config: Mapping[str, Any]) -> Estimate:
    """Estimate the memory of a config's training step. The weights take no memory here.

    Raises:
        UserError: images of any size, or another model than `LatentDiffusion`.
    """
    with torch.device("meta"):
        model = instantiate_from_config(target_of(config), "model")
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"model.target: {config['model']['target']}: an estimate is for LatentDiffusion"
        )
    data = config["data"]["params"]
    size = RunConfig(data).get("train.params.size")
    if not size:
        raise UserError("data.params.train.params.size: needed for an estimate")
    model.configure_model()
    samples = data["batch_size"] * (1 + has_prior(config))
    accumulates = accumulated(config) > 1
    with under("model.params"):
        return estimate(model, model.optimizer, samples, size, autocast_dtype(config), accumulates)


def predicted(variants: Sequence[Variant]) -> tuple[dict[str, Any], str]:
    """Return the estimates of several configs, as figures in bytes and as a table in GB."""
    found = {variant.name: predict(variant.config) for variant in variants}
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    for name, e in found.items():
        cells = (e.weights, e.optimizer, e.gradients, e.activations, e.shared, e.total)
        lines.append(f"| {name} | {' | '.join(f'{cell / GB:.2f}' for cell in cells)} |")
    figures = {name: {**vars(e), "total": e.total} for name, e in found.items()}
    return figures, "\n".join(lines)
