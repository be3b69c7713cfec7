"""The model that a run begins with, and where its weights are from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.embeddings import ROWS, read_embeddings
from ldm.checkpoints.parts import load_parts
from ldm.config import RunConfig
from ldm.errors import UserError, under
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training import summary
from ldm.util import get_obj_from_str, instantiate_from_config

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from, beside its config.

    `weights` are a checkpoint's, of which `take` names the trained or the EMA ones (by default the
    trained); `embeddings` are a textual-inversion file's; `init_word` gives the identifier
    another word's embedding.
    """

    weights: Path | None = None
    take: str | None = None
    embeddings: Path | None = None
    init_word: str | None = None


def build_model(config: RunConfig, start: Start, resumes: bool) -> tuple[pl.LightningModule, str]:
    """Return the model with its initial weights, and a line that says where they are from.

    The checkpoint is read once, and no weight is initialised that it will overwrite.
    """
    # A run that goes on gets its weights from Lightning, together with the optimizer's state.
    if resumes:
        return instantiate_from_config(config.model, "model"), ""
    known: list[str] = []
    if start.weights is None:
        # Training from scratch, but for networks whose config names a file of their own.
        model, report = instantiate_from_config(config.model, "model"), "newly initialised"
        load_parts(model)
    else:
        # A folder has no config of its own; a file's adapters have the scale that its own says.
        checkpoint = Checkpoint.open(
            start.weights, config.content if start.weights.is_dir() else None
        )
        # A LoRA or one network alone is named before the time that building the model takes.
        cls = get_obj_from_str(config.model["target"], "model.target")
        checkpoint.refuse_other_kinds(
            parts=isinstance(cls, type) and issubclass(cls, LatentDiffusion)
        )
        checkpoint = checkpoint.merged()
        # EMA weights come along only for a model that goes on averaging them.
        keeps_ema = bool(config.get("model.params.use_ema", True))
        weights = _with_channels(checkpoint.for_training(start.take, keeps_ema), config)
        model, loaded = weights.build(config=config.content)
        known = _known_words(model, weights)
        report = f"{checkpoint}; {loaded}"
    # Last, because these are made of rows of the embedding table that was just read, or replace
    # some.
    if getattr(model, "embedding_manager", None) is not None:
        report += f"; {_start_new_words(model, start, known)}"
    elif start.embeddings or start.init_word:
        if len(config.identifiers) > 1:
            raise UserError(
                "--init_word and --embedding_manager_ckpt: are for one subject, and "
                f"data.params.concepts has {len(config.identifiers)}: learn new words for them "
                "(model.params.personalization_config), or leave the flag out"
            )
        report += _write_embeddings(model, start, config.identifier)
    return model, report


def _with_channels(weights: Checkpoint, config: RunConfig) -> Checkpoint:
    """Return the weights with the input channels of an inpainting model, where they lack them."""
    wanted = config.get("model.params.unet_config.params.in_channels")
    has = weights.input_channels
    reads_masks = config.get("model.params.conditioning_key") == "hybrid"
    if not reads_masks or not wanted or not has or has >= wanted:
        return weights
    # Adapters do not change the first convolution, so it would never read its new channels.
    if config.get("model.params.lora"):
        raise UserError(
            f"{weights.path}: reads {has} channels, an inpainting model {wanted}: adapters cannot "
            "learn the new ones; start a lora from an inpainting model"
        )
    log.info("%s: reads %d channels; %d more start from 0", weights.path, has, wanted - has)
    return weights.for_inpainting(wanted)


def _known_words(model: nn.Module, weights: Checkpoint) -> list[str]:
    """Return the new words whose vectors are in a file; warn of those that the model has not."""
    known = [key.removeprefix(ROWS) for key in weights.state if key.startswith(ROWS)]
    has = getattr(model, "embedding_manager", None)
    lost = [word for word in known if has is None or word not in has.words]
    if lost:
        log.warning(
            "%s: its new words %s are lost: name them in "
            "model.params.personalization_config.params.placeholder_strings to keep them",
            *(weights.path, ", ".join(lost)),
        )
    return known


def _start_new_words(model: LatentDiffusion, start: Start, known: list[str]) -> str:
    """Give a model's new words the vectors of a file, or of the words that they start as."""
    manager, parts = model.embedding_manager, []
    assert manager is not None
    if start.embeddings:
        words = manager.start_as_embeddings(read_embeddings(start.embeddings))
        parts.append(f"{', '.join(words)} as in {start.embeddings}")
        # What the file has not may still start as a word.
        if len(words) == len(manager.words):
            return parts[0]
        known = [*known, *words]
    with under("model.params"):
        return "; ".join([*parts, manager.start_as_words(known)])


def _write_embeddings(model: LatentDiffusion, start: Start, identifier: str) -> str:
    from ldm.modules.embedding_manager import EmbeddingManager

    manager, report = EmbeddingManager(model.cond_stage_model), ""
    if start.init_word:
        manager.initialize(start.init_word, identifier)
        report += f"; {identifier} starts as {start.init_word}"
    if start.embeddings:
        words = manager.start_from(read_embeddings(start.embeddings), identifier)
        verb = "starts" if len(words) == 1 else "start"
        report += f"; {', '.join(words)} {verb} from {start.embeddings}"
    if getattr(model, "lora", None):
        log.warning(
            "%s will not hold the changed embeddings; the merged model does (scripts/convert.py)",
            summary.LORA,
        )
    return report
