"""What is measured side by side: a config, the config with a few keys changed, and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.benchmark.machine import require_diffusers
from ldm.benchmark.reference import accumulated, autocast_dtype, has_prior
from ldm.benchmark.rows import Row
from ldm.benchmark.train import OURS, Settings, measure_training
from ldm.checkpoints.export import DTYPES
from ldm.config import RunConfig, check_config, load_config, to_plain
from ldm.errors import UserError
from ldm.host import huge_pages_environment
from ldm.training.defaults import TRAINER_KEYS

AGAINST = ("diffusers", "two-forward")


@dataclass(frozen=True)
class Variant:
    """A row of the table: its `kind` is `ours`, or one of `AGAINST`."""

    name: str
    kind: str
    config: dict[str, Any]


def variants(
    base: Sequence[Path], overrides: Sequence[str], switches: Sequence[str], against: Sequence[str]
) -> list[Variant]:
    """List the references, ours as configured, and ours with each switch.

    Raises:
        UserError: a config, override or switch that is wrong, a name given twice, or a reference
            that cannot be built.
    """
    config = checked_config(base, overrides)
    rows = [Variant(kind, kind, config) for kind in against]
    rows += [Variant(OURS, OURS, config)]
    for switch in switches:
        name, changes = parse_switch(switch)
        rows.append(Variant(name, OURS, checked_config(base, [*overrides, *changes])))
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"'{twice[0]}' is the name of two rows")
    if against and config["model"]["params"].get("lora"):
        raise UserError(
            f"--against {against[0]}: trains all weights, model.params.lora only adapters"
        )
    if "diffusers" in against:
        require_diffusers()
    return rows


def checked_config(base: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Merge the files and overrides, and check that each key is read and that there is a
    subject.
    """
    config = to_plain(load_config(base, overrides))
    check_config(config, TRAINER_KEYS)
    if not RunConfig(config).get("data.params.train"):
        raise UserError("data.params.train: needed to train")
    return config


def parse_switch(text: str) -> tuple[str, list[str]]:
    """Split `"name: key=value key=value"` into its name and its overrides."""
    name, colon, changes = text.partition(":")
    if not (name.strip() and colon and changes.split()):
        raise UserError(f"--switch '{text}': expected 'NAME: key.path=value ...'")
    return name.strip(), changes.split()


def training_rows(
    base: Sequence[Path],
    overrides: Sequence[str],
    switches: Sequence[str],
    against: Sequence[str],
    settings: Settings,
) -> list[Row]:
    """Return what measures each of `variants`; raise as it does."""
    return [
        Row(
            v.name,
            measure_training,
            (v.kind, v.config, settings),
            images_per_step(v.config),
            _dtype(v),
            huge_pages_environment(v.config) if v.kind == OURS else {},
        )
        for v in variants(base, overrides, switches, against)
    ]


def images_per_step(config: dict[str, Any]) -> int:
    """Count the images of an optimizer step, those of the subject and of the class."""
    return config["data"]["params"]["batch_size"] * (1 + has_prior(config)) * accumulated(config)


def _dtype(variant: Variant) -> str:
    """Return the name in `DTYPES` of what a variant computes in."""
    dtype = None if variant.kind == "two-forward" else autocast_dtype(variant.config)
    return next(name for name, known in DTYPES.items() if known == (dtype or torch.float32))
