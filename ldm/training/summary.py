"""The screen a user sees before and after training."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import Timer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.callbacks.checkpoints import CheckpointKeeper
from ldm.callbacks.first_step import PARTS
from ldm.callbacks.setup import callbacks_of
from ldm.callbacks.timing import TimingCallback
from ldm.config import RunConfig
from ldm.data.datamodule import DataModuleFromConfig
from ldm.distributed import is_sharded
from ldm.modules.encoders.t5 import Encode, words_of
from ldm.optim.schedules import WarmupDecay
from ldm.training import memory
from ldm.training.resume import Resumed
from ldm.training.run import Run, lost_steps, nothing_saved, relative, resume_command
from ldm.training.stages import Stages

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from ldm.models.diffusion.ddpm import LatentDiffusion

LORA = "lora.safetensors"  # beside the checkpoints of a LoRA run
TOKENS_SHOWN = 16  # of a caption


def _rows(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(
        [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items() if text)]
    )


def count(module: nn.Module, trainable: bool) -> int:
    """Count the parameters of a module that are trained, or that are not."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trainable)


def parameters(model: nn.Module) -> str:
    """Say what is trained and what is frozen, in millions of parameters by part."""

    def listed(trainable: bool) -> str:
        parts = {
            PARTS.get(name, name): count(child, trainable) for name, child in model.named_children()
        }
        return " + ".join(
            f"{name} {number / 1e6:.2f} M" for name, number in parts.items() if number
        )

    frozen = listed(False)
    # A few vectors are no part of a million.
    words = getattr(model, "embedding_manager", None)
    if words is not None and getattr(model, "words_alone", False):
        return f"new word {words}; frozen: {frozen}"
    pivots = "" if words is None else f"; the new word {words} stays as it is"
    return listed(True) + (f"; frozen: {frozen}" if frozen else "") + pivots


def prompts(texts: list[str], encode: Encode, shown: int = 2) -> str:
    """Quote prompts with their token ids, of which those of a rare identifier are worth a look. Of
    a long caption the beginning is quoted.

    Args:
        encode: gives the ids of a text's words.
    """
    lines = []
    for text in texts[:shown]:
        ids = encode(text)
        rest = f" ... ({len(ids)} in all)" if len(ids) > TOKENS_SHOWN else ""
        quoted = textwrap.shorten(text, 6 * TOKENS_SHOWN, placeholder=" ...") if rest else text
        numbers = " ".join(map(str, ids[:TOKENS_SHOWN]))
        lines.append(f'"{quoted}" = tokens {numbers}{rest}')
    return ", ".join(lines) + (f", and {len(texts) - shown} more" if len(texts) > shown else "")


def text_encoder(model: nn.Module) -> str:
    """Say how the text encoder's training differs from the UNet's."""
    training = getattr(model, "text_training", None)
    parts = []
    if training and training.lr is not None:
        parts.append(f"at {training.lr:.3g}")
    if training and training.stop is not None:
        parts.append(f"until step {training.stop}")
    return f", text encoder {' '.join(parts)}" if parts else ""


def preservation(model: LatentDiffusion) -> str:
    """Say how the prior is kept, where it is not by class images alone."""
    options = getattr(model, "preservation", None)
    if options is None or options.method == "class_images":
        return ""
    weight = f", weight {model.objective.reg_weight:g}" if options.chosen.has_prior(True) else ""
    copied = options.copied_bytes(model)
    more = f", {copied / memory.GB:.2f} GB of weights more" if copied else ""
    return f"{options}{weight}{more}"


def subjects(
    data: DataModuleFromConfig, found: Mapping[str, object], encode: Encode
) -> dict[str, str]:
    """Return the rows about subjects and their classes: two, or two for each of several subjects.

    Args:
        found: what the data says of all of them together.
        encode: gives the ids of a text's words.
    """
    concepts = data.concepts if isinstance(data, DataModuleFromConfig) else []
    several = len(concepts) > 1
    each = [concept.summary() for concept in concepts] if several else [found]
    share = sum(concept.weight for concept in concepts)
    rows = {}
    for number, own in enumerate(each, 1):
        for name in ("subject", "class"):
            images, texts = own[f"{name}_images"], own[f"{name}_prompts"]
            if not images:
                continue
            text = f"{images} images" + (f"; {prompts(texts, encode)}" if texts else "")
            if several and name == "subject":
                weight, where = concepts[number - 1].weight, concepts[number - 1].folder
                text = f"{where}: {text}; {weight / share:.0%} of the examples"
            rows[f"{name} {number}" if several else name] = text
    return rows


def schedule(trainer: pl.Trainer) -> str:
    """Return how the learning rate changes with the steps."""
    for config in trainer.lr_scheduler_configs:
        function = (
            config.scheduler.lr_lambdas[0] if isinstance(config.scheduler, LambdaLR) else None
        )
        if isinstance(function, WarmupDecay) and str(function):
            return f", {function}"
    return ""


def start(
    trainer: pl.Trainer,
    model: Any,
    data: DataModuleFromConfig,
    run: Run,
    weights: str,
    training: str,
    resumed: Resumed | None = None,
    class_word: str = "",
    engine: str = "",
) -> str:
    """Say what is about to happen: parameters, images, prompts, precision, steps, where the output
    goes, and what the engine has chosen.
    """
    rows = {"training": training, "weights": weights}
    found = data.summary()
    rows |= subjects(data, found, words_of(getattr(model, "cond_stage_model", None)))
    rows["class word"] = class_word
    batch = f"batch {data.batch_size}"
    for number, unit in (
        (trainer.world_size, "processes"),
        (trainer.accumulate_grad_batches, "accumulated"),
    ):
        batch += f" x {number} {unit}" if number > 1 else ""
    if found["class_images"]:
        batch += f" of each; loss = subject + {model.objective.reg_weight:g} x prior"
    if kept := preservation(model):
        rows["prior"] = kept
    rows["step"] = (
        f"{batch}; learning rate {model.learning_rate:.3g}{text_encoder(model)}{schedule(trainer)}"
    )
    until = (
        f"{trainer.max_steps} steps" if trainer.max_steps > 0 else f"{trainer.max_epochs} epochs"
    )
    rows["steps"] = f"to {until}"
    if resumed:
        rows["steps"] += f", going on from step {resumed.step} ({run.resume_from})"
        if 0 < trainer.max_steps <= resumed.step:
            rows["steps"] += "; none is left: --max_steps with a larger number goes on"
        rows["changed"] = "; ".join(resumed.changed)
        rows["changed before"] = "; ".join(resumed.still_changed)
    device = trainer.strategy.root_device
    rows["device"] = f"{device}, precision {trainer.precision}" + (
        f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    )
    rows["engine"] = engine
    if is_sharded(trainer):
        rows["sharded"] = f"over {trainer.world_size} processes"
    elif estimate := memory.of_run(trainer, model, data):
        rows["memory"] = memory.outlook(trainer, model, estimate)
    rows["output"] = str(run.folder)
    return _rows("Training", rows)


def limit_reached(trainer: pl.Trainer) -> str:
    """Return the name of the trainer's limit, besides max_steps, that has ended a run, or ""."""
    for callback in callbacks_of(trainer):
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "max_time"
    epochs = trainer.max_epochs
    if epochs is not None and 0 <= epochs <= trainer.current_epoch:
        return "max_epochs"
    return ""


def end(
    trainer: pl.Trainer,
    keeper: CheckpointKeeper | None,
    timing: TimingCallback | None,
    prompt: str | None,
    exported: Path | None = None,
    embeddings: Sequence[Path] = (),
    run: Run | None = None,
    stages: Stages | None = None,
) -> str:
    """Say what has happened: steps, their time and memory, the checkpoints, and how to sample."""
    done, limit = f"{trainer.global_step} steps", ""
    # A run that ended before its last step says so, and why. It would look finished.
    if trainer.global_step < trainer.max_steps:
        limit = limit_reached(trainer)
        done = f"{trainer.global_step} of {trainer.max_steps} steps"
        done += f": lightning.trainer.{limit} is reached" if limit else ""
    if timing is not None and timing.seconds_per_step:
        done += f", {timing.seconds_per_step:.3g} s a step"
        done += f", {timing.peak_bytes / 1e9:.2f} GB peak memory"
    rows = {"trained": done}
    if stages is not None:
        rows["time"] = str(stages)
    if keeper is None or not keeper.last_path.exists():
        return _rows("Done, without a checkpoint, as configured", rows)
    rows["last"] = str(keeper.last_path)
    if limit and run is not None:
        rows["go on"] = f"{resume_command(run)} lightning.trainer.{limit}=null"
    lora = keeper.last_path.with_name(LORA)
    if lora.exists():
        rows["LoRA"] = f"{lora}: the adapters alone, for other programs"
    if embeddings:
        rows["new words"] = f"{', '.join(map(str, embeddings))}: for prompts and other programs"
    if exported:
        rows["exported"] = f"{exported}: the weights alone, {exported.stat().st_size / 1e9:.3g} GB"
    if keeper.best:
        rows["best"] = f"{keeper.best[0]} ({keeper.score} {keeper.best[1]:.4g})"
    if prompt is not None:
        command = [
            "python",
            "scripts/stable_txt2img.py",
            "--ckpt",
            relative(keeper.last_path),
            "--prompt",
            prompt,
        ]
        rows["sample"] = shlex.join(command)
    return _rows("Done", rows)


def left(keeper: CheckpointKeeper | None, run: Run, first: int = 0, made: int = 0) -> str:
    """Say which step an early end has left, which it has not, and how to go on.

    Args:
        first: the step that this start of the run went on from.
        made: the last step that it made.
    """
    if keeper is None or keeper.last_step is None:
        return nothing_saved(run, lost_steps(first, made))
    lost = lost_steps(keeper.last_step, made)
    saved = f"step {keeper.last_step} is saved in {relative(keeper.last_path)}{lost}"
    return f"{saved}; go on with: {resume_command(run)}"


def trained_already(keeper: CheckpointKeeper | None, config: RunConfig) -> str:
    """Say what is there, and how to export it, if that is what has failed."""
    if keeper is None or not keeper.last_path.exists():
        return "the training itself is done"
    last = relative(keeper.last_path)
    text = f"the training itself is done: {last}"
    if config.export is None:
        return text
    command = ["python", "scripts/convert.py", "--ckpt", last, "--output", "FILE.safetensors"]
    return f"{text}; export it with: {shlex.join([*command, '--dtype', config.export])}"
