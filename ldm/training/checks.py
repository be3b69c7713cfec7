"""What is checked of a run before its first step: metrics, class images, the identifier."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from ldm.callbacks.setup import callbacks_of
from ldm.config import RunConfig
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.prompts import as_word
from ldm.errors import UserError, nearest, under
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.t5 import Encode

log = logging.getLogger(__name__)

RATES = "lr-"  # how the metrics of Lightning's LearningRateMonitor begin
KNOWN = (
    "ldm",
    "main",
    "pytorch_lightning",
)  # packages whose callbacks log nothing that is not known here


def check_monitors(
    trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule, config: RunConfig
) -> None:
    """Compare the metrics that callbacks watch with those that the model says it logs.

    Raises:
        UserError: nothing logs a watched metric in this run, so that its callback would never act.
    """
    if not isinstance(model, LatentDiffusion) or not isinstance(data, DataModuleFromConfig):
        return
    if not all(_is_known(callback) for callback in callbacks_of(trainer)):
        return  # others log what they like
    has_prior = "reg" in data.datasets or bool(data.num_class_images)
    logged = model.metric_names(has_prior)
    without_validation = _why_no_validation(trainer, data)
    for where, metric, is_needed in _watched(trainer, config):
        if metric.startswith(RATES) or metric in logged["train"]:
            continue
        if metric not in logged["val"]:
            names = [*logged["train"], *([] if without_validation else logged["val"])]
            raise UserError(
                f"{where}: nothing logs '{metric}'{nearest(metric, names)}; logged are "
                f"{', '.join(names)}"
            )
        if is_needed and without_validation:
            trained = ", ".join(logged["train"])
            raise UserError(
                f"{where}: '{metric}' is of the validation, but {without_validation}; without "
                f"it: {trained}"
            )


def _is_known(callback: pl.Callback) -> bool:
    return type(callback).__module__.partition(".")[0] in KNOWN


def _watched(trainer: pl.Trainer, config: RunConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield the key that names a metric, the metric, and whether its callback is idle without
    it.
    """
    for callback in callbacks_of(trainer):
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            yield f"{_key_of(callback, config)}.params.monitor", monitor, True
        # Of `model.params.monitor` the summary names the best checkpoint, where it is measured.
        score = getattr(callback, "score", None)
        if isinstance(score, str):
            yield "model.params.monitor", score, False


def _key_of(callback: pl.Callback, config: RunConfig) -> str:
    """Return the key of the config that has made a callback."""
    if isinstance(callback, pl.callbacks.Checkpoint):
        return "lightning.modelcheckpoint"
    kind = type(callback).__name__
    for name, value in config.section("lightning.callbacks").items():
        if isinstance(value, Mapping) and str(value.get("target")).rpartition(".")[2] == kind:
            return f"lightning.callbacks.{name}"
    return kind


def _why_no_validation(trainer: pl.Trainer, data: DataModuleFromConfig) -> str:
    """Return why this run never validates; an empty text if it does."""
    if "validation" not in data.datasets:
        return "the config has no data.params.validation"
    if trainer.limit_val_batches == 0:
        return "lightning.trainer.limit_val_batches is 0"
    # After how many steps the first validation comes.
    batches = max(1, len(data.datasets["train"]) // (data.batch_size * trainer.world_size))
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        first = interval
    elif isinstance(interval, float):
        first = (
            int(batches * interval)
            if interval < 1
            else batches * (trainer.check_val_every_n_epoch or 1)
        )
    else:
        return ""  # a time
    step = math.ceil(first / trainer.accumulate_grad_batches)
    if 0 < trainer.max_steps < step:
        return f"the first one comes after step {step} and max_steps is {trainer.max_steps}"
    return ""


def check_preservation(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Raise a `UserError` if a run's data is not what its way to keep the prior works with."""
    if not isinstance(model, LatentDiffusion) or not isinstance(data, DataModuleFromConfig):
        return
    has_class_images = "reg" in data.datasets or bool(data.num_class_images)
    with under("model.params"):
        model.preservation.check_data(has_class_images, data.summary()["unnamed_prompts"])


def check_new_words(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Raise a `UserError` if the captions hold none of the words that a training is to learn.

    Warn of captions without one, from which nothing is learned.
    """
    manager = getattr(model, "embedding_manager", None)
    if manager is None or not isinstance(data, DataModuleFromConfig):
        return
    prompts = data.summary()["subject_prompts"]
    without = [text for text in prompts if not manager.words_in(text)]
    words = ", ".join(f"'{word}'" for word in manager.words)
    if prompts and len(without) == len(prompts):
        raise UserError(
            f"data.params.train.params: no caption holds {words}, as '{without[0]}': set "
            f"identifier to it, and templates with {{identifier}} in them"
        )
    if without and model.words_alone:
        log.warning(
            "%d captions hold none of the new words %s, as '%s': nothing is learned from them",
            *(len(without), words, without[0]),
        )
    held = {word for text in prompts for word in manager.words_in(text)}
    unread = [f"'{word}'" for word in manager.words if word not in held]
    if unread and prompts and model.words_alone:
        log.warning("%s: in no caption, so nothing is learned for it", ", ".join(unread))
    if model.words_alone and ("reg" in data.datasets or data.num_class_images):
        raise UserError(
            "data.params.reg: class images teach new words nothing: leave out --reg_data_root"
        )


def check_identifiers(config: RunConfig, found: Mapping[str, Any], encode: Encode) -> None:
    """Warn of each word that is to name a subject and is in none of its prompts, or is several
    tokens.

    Args:
        found: what the data says of the subjects, see `DataModuleFromConfig.summary`.
    """
    each = found.get("concepts", [found])
    for number, (identifier, own) in enumerate(zip(config.identifiers, each)):
        where = f"concepts[{number}]" if config.concepts else "train.params"
        # A new word has tokens of its own.
        if identifier not in config.new_words:
            prompts = own["subject_prompts"]
            check_identifier(identifier, prompts, encode, f"data.params.{where}.identifier")


def check_identifier(
    identifier: str,
    prompts: Sequence[str],
    encode: Encode,
    where: str = "data.params.train.params.identifier",
) -> None:
    """Warn if the word that is to name the subject is in no prompt, or is several tokens."""
    # Words that read as its tokens count, such as SKS, which CLIP reads as sks.
    tokens, pattern = encode(identifier), re.compile(as_word(identifier), re.IGNORECASE)
    found = {word for prompt in prompts for word in pattern.findall(prompt)}
    if not any(encode(word) == tokens for word in found):
        log.warning(
            "%s: no caption of the subject has '%s', so that word will not mean it; "
            "write it into the captions, or into a template as {identifier}",
            *(where, identifier),
        )
        return
    if len(tokens) > 1:
        log.warning(
            "%s: '%s' is %d tokens (%s), which other words share: "
            "a rare word of one token, such as sks, is bound more easily",
            *(where, identifier, len(tokens), " ".join(map(str, tokens))),
        )
