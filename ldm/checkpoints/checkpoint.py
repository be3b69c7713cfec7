"""`Checkpoint`: what a weights file is, whoever opens it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.ema import (
    ema_weights,
    weights_to_sample_from,
    weights_to_train,
    without_averages,
)
from ldm.checkpoints.export import (
    SUFFIXES,
    in_dtype,
    shared_config,
    target_of,
    training_facts,
    write_weights,
)
from ldm.checkpoints.families import FIRST, Family, config_for, recognise, widened
from ldm.checkpoints.headers import kind_of
from ldm.checkpoints.layouts import NEW_WORDS, absent_networks, with_our_names
from ldm.checkpoints.loading import (
    EmptyInit,
    LoadReport,
    config_keys,
    describe,
    fitted,
    instantiate_filled,
)
from ldm.checkpoints.lora import adapted_layers, merge_adapters
from ldm.checkpoints.other_files import of_content, of_weights
from ldm.checkpoints.pipeline_folder import open_pipeline, save_pipeline
from ldm.checkpoints.reading import read_checkpoint, refuse_single_shard, state_dict_of
from ldm.config import RunConfig, load_config, to_plain
from ldm.errors import UserError, under
from ldm.host import environment
from ldm.modules.adapters import lora_options
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

Config = Mapping[str, Any]
SCHEDULE_ENDS = ("betas", "posterior_mean_coef2")  # the first and the last tensor of a schedule


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, and what is known about them. Each method returns a new value; the file
    stays as it is.

    Args:
        path: where the weights are from, for messages.
        state: the tensors by our names, which are those of a CompVis checkpoint.
        config: of the model that they fit, plain containers with `model`; empty where nothing says
            it.
        facts: how they were trained; empty where nothing says it.
        adapters: `rank` and `alpha` of a LoRA run, whose adapters are in `state` beside the
            weights.
    """

    path: Path
    state: Mapping[str, Tensor]
    config: Config
    facts: Mapping[str, Any]
    adapters: Mapping[str, Any] | None = None

    # Opening

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: str | Path | Config | None = None,
        mapped: bool = True,
    ) -> Checkpoint:
        """Read a checkpoint: a file of any format, the index of a sharded one, or a diffusers
        folder.

        Args:
            config: of the model, a YAML file or plain containers; by default the one that the file
                carries, or that lies in its run's folder. A folder needs one where it is of no
                family that we know.
            mapped: as `read_checkpoint` has it.

        Raises:
            UserError: there is no such file, or it cannot be used; the message says what it is.
        """
        path = Path(path)
        given = to_plain(load_config([config])) if isinstance(config, (str, Path)) else config
        if path.is_dir():
            state, fitting = open_pipeline(path, given)
            return cls(path, state, fitting, {})
        refuse_single_shard(path)
        content = read_checkpoint(path, mapped)
        what = of_content(content)
        if what:
            raise UserError(f"{path}: {what}")
        own = find_config(content, path)
        state = with_our_names(state_dict_of(content, path), path)
        said = content.get("training")
        if isinstance(said, Mapping):
            facts = said
        else:
            facts = training_facts(own, content.get("global_step"))
            if facts and "environment" in content:
                facts["environment"] = content["environment"]
        adapters = _adapters_in(own)
        if adapters is None:
            adapters = _adapters_in(given)
        return cls(path, state, given or own or {}, facts, adapters)

    @classmethod
    def of_run(
        cls,
        path: Path,
        state: Mapping[str, Tensor],
        config: Config,
        steps: int,
        images: Mapping[str, int] | None = None,
    ) -> Checkpoint:
        """Return the weights of a run of `config` after `steps`, which is about to write them to
        `path`.

        Args:
            images: how many the run has, `subject_images` and `class_images`.
        """
        facts = training_facts(config, steps, images)
        if facts:
            facts["environment"] = environment()
        return cls(path, state, config, facts, _adapters_in(config))

    # Looking

    def __str__(self) -> str:
        return f"{self.path}: {describe(self.state)}"

    @property
    def family(self) -> Family | None:
        """The kind of Stable Diffusion that these weights are; None if they are of no known one."""
        return recognise(self.state)

    @property
    def input_channels(self) -> int | None:
        """The number of channels that the UNet reads; None where there is no UNet."""
        return self.state[FIRST].shape[1] if FIRST in self.state else None

    @property
    def has_adapters(self) -> bool:
        """Whether these are a LoRA run's weights, with adapters beside what they change."""
        return bool(adapted_layers(self.state))

    @property
    def is_whole(self) -> bool:
        """Whether all three networks of a model are there."""
        return not absent_networks(self.state)

    def fitting_config(self, otherwise: Config | None = None) -> Config:
        """Return the config of the model that these weights fit: the known one, or that of their
        family.

        Args:
            otherwise: what it is taken for where nothing says it.

        Raises:
            UserError: nothing says it.
        """
        if self.config:
            return self.config
        other = of_weights(self.state)
        if other and not self.is_whole:
            raise UserError(f"{self.path}: {other}")
        family = self.family
        if otherwise and (family is None or len(family.paths) > 1):
            return otherwise
        return to_plain(load_config([config_for(self.state, self.path)]))

    def check_whole(self) -> Checkpoint:
        """Return the same; raises a `UserError` if a network of the model is missing."""
        self.refuse_other_kinds()
        absent = absent_networks(self.state)
        if absent:
            other = of_weights(self.state)
            names = " and no ".join(absent)
            missing = f"no {names} in it: a file with all three networks is needed"
            raise UserError(f"{self.path}: {other or missing}")
        return self

    def refuse_other_kinds(self, parts: bool = False) -> Checkpoint:
        """Return the same; raises a `UserError` for weights of something else: a LoRA, a
        ControlNet, another kind.

        Args:
            parts: raise for one network of a model alone, too.
        """
        other = of_weights(self.state)
        if other and (parts or not other.is_part):
            raise UserError(f"{self.path}: {other}")
        return self

    # Choosing

    def alpha(self) -> float:
        """Return the scale of a LoRA run's adapters; raises a `UserError` if no config says it."""
        if self.adapters is None:
            raise UserError(
                f"{self.path}: a LoRA run's checkpoint without the config that ran: give it with "
                "--config"
            )
        with under("model.params"):
            return lora_options(self.adapters).alpha

    def merged(self) -> Checkpoint:
        """Return the weights of a plain model: the adapters of a LoRA run become part of what they
        change.

        Raises:
            UserError: there are adapters, and no config says their scale.
        """
        if not self.has_adapters:
            return self
        return replace(self, state=merge_adapters(self.state, self.alpha()), adapters=None)

    def trained(self) -> Checkpoint:
        """Return the weights as the last step left them, alone."""
        return replace(self, state=without_averages(self.state))

    def ema(self) -> Checkpoint:
        """Return the averaged weights in the places of those they average; raises a `UserError` if
        there are none.
        """
        return replace(self, state=ema_weights(self.state, self.path))

    def for_sampling(self, weights: str | None = None) -> Checkpoint:
        """Return one copy of the weights, the averaged ones where there are any, and a config
        without training.

        Args:
            weights: `trained` or `ema`, to choose.
        """
        state = weights_to_sample_from(self.state, self.path, weights)
        return replace(self, state=state, config=self._shared_config())

    def for_training(self, weights: str | None = None, keeps_ema: bool = False) -> Checkpoint:
        """Return the weights that a training starts from: the trained ones, unless `weights` is
        `ema`.

        Args:
            keeps_ema: the averages come along, for a model that goes on with them.
        """
        return replace(self, state=weights_to_train(self.state, self.path, weights, keeps_ema))

    def for_inpainting(self, channels: int) -> Checkpoint:
        """Return the weights of a UNet that reads so many input channels; new ones weigh 0."""
        return replace(self, state=widened(self.state, channels))

    def for_sharing(self) -> Checkpoint:
        """Return the weights as they are, the averages beside the trained ones, and a config
        without training.
        """
        return replace(self, config=self._shared_config())

    def _shared_config(self) -> Config:
        return shared_config(self.config, self._has_new_words())

    def _has_new_words(self) -> bool:
        return any(key.startswith(NEW_WORDS) for key in self.state)

    def only(self, prefixes: Sequence[str]) -> Checkpoint:
        """Return the tensors whose names start with one of the prefixes.

        Raises:
            UserError: no tensor starts with one of them.
        """
        for prefix in prefixes:
            if not any(key.startswith(prefix) for key in self.state):
                raise UserError(f"--only {prefix}: no tensor of {self.path} starts so")
        chosen = tuple(prefixes)
        return self.with_state({k: v for k, v in self.state.items() if k.startswith(chosen)})

    def as_lora(self, state: Mapping[str, Tensor]) -> Checkpoint:
        """Return a LoRA file's tensors, with what is known about the training and the kind of model
        that it is for.
        """
        facts = {**self.facts, "model": kind_of(self.state, self.config)}
        return replace(self, state=state, config={}, facts=facts, adapters=None)

    def with_state(self, state: Mapping[str, Tensor]) -> Checkpoint:
        """Return the same with other tensors."""
        return replace(self, state=state)

    # Using

    def build(
        self, dtype: torch.dtype | None = None, config: Config | None = None
    ) -> tuple[Any, LoadReport]:
        """Return the model with these weights as its own, and a report of what fitted.

        Args:
            dtype: of its matrices and convolutions; by default they have the model's, float32.
            config: of the model, instead of the one that these weights fit.

        Raises:
            UserError: the weights do not fit the config, or nothing says which config they fit.
        """
        config = config or self.fitting_config()
        return instantiate_filled(target_of(config), self.state, self.path, dtype)

    def complete(self) -> Checkpoint:
        """Return the weights with the noise schedule that the config determines, where it is not
        in the file as a whole and exactly.

        Where no config is known they stay as they are.
        """
        family = self.family
        schedule = [self.state[key] for key in SCHEDULE_ENDS if key in self.state]
        is_there = len(schedule) == len(SCHEDULE_ENDS)
        if is_there and all(value.dtype == torch.float32 for value in schedule):
            return self
        if not self.is_whole or not (self.config or family):
            return self
        # The schedules of a family's configs are the same.
        config = self.config
        if not config and family:
            config = to_plain(load_config([family.paths[0]]))
        with EmptyInit():
            model = instantiate_from_config(target_of(shared_config(config)), "model")
        state = fitted(model, self.state, self.path)
        own = {key: value for key, value in model.state_dict().items() if key in config_keys(model)}
        return self.with_state({**own, **state})

    def save(self, path: Path, dtype: torch.dtype | None = None, title: str | None = None) -> None:
        """Write the weights to a `.safetensors` or `.ckpt` file, or, under another name, as a
        diffusers folder.

        Args:
            dtype: of the matrices and convolutions; by default they stay as they are.
            title: of the weights, for people; by default the file's name.

        Raises:
            UserError: the disk is too small, or a folder is there already or cannot be made of this
                model.
        """
        if path.suffix in SUFFIXES:
            write_weights(path, in_dtype(self.state, dtype), self.config, self.facts, title)
            return
        if self._has_new_words():
            log.warning(
                "%s: a diffusers folder holds no new words: write them beside it with "
                "scripts/convert.py --words, and load them with load_textual_inversion",
                path,
            )
        config = self.fitting_config()
        model, _ = self.with_state(in_dtype(self.state, dtype)).build(config=config)
        save_pipeline(model.to(dtype) if dtype else model, config["model"]["params"], path)


def find_config(content: Mapping[str, object], checkpoint: Path) -> dict[str, Any] | None:
    """Return the config that a checkpoint of ours carries, or that lies in its run's folder; None
    for others.
    """
    config = content.get("config")
    if isinstance(config, dict) and "model" in config:
        return config
    saved = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    config = to_plain(load_config(saved)) if saved else {}
    return config if "model" in config else None


def _adapters_in(config: Config | None) -> Mapping[str, Any] | None:
    """Return the size of the adapters that a config gives its model; None if it gives none."""
    return RunConfig(config or {}).get("model.params.lora")
