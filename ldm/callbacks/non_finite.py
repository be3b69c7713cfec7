"""A loss or a weight that is not finite ends the run, before a checkpoint could hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.callbacks.checkpoints import CheckpointKeeper
from ldm.data.datamodule import Examples, PositionBatches, Stream
from ldm.errors import UserError
from ldm.optim.boundary import at_step_boundary
from ldm.rng import derive_seed

NAMES = {"train/loss": "subject", "train/loss_prior": "prior"}
SHOWN = 8  # examples of each half that the error lists


class StopOnNonFinite(pl.Callback):
    """Raises a `UserError` after the first batch whose loss is not finite, and instead of writing such weights.

    The loss is read when the batch is done, as the progress bar does, so that the device waits no second time. It
    has to come before what writes checkpoints. All ranks stop together.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        here = not _finite(_losses(trainer, outputs))
        if not trainer.strategy.reduce_boolean_decision(here, all=False):
            return
        step = trainer.global_step + (not at_step_boundary(trainer, batch_idx))
        if not here:
            raise UserError(f"step {step}: stopped, for another process's loss is not finite")
        raise UserError(
            f"step {step}: the loss is not finite ({_losses_text(trainer)}), "
            f"of the batch {_batch_text(trainer, batch)}; "
            f"{_advice(trainer, pl_module)}; {_last_checkpoint(trainer)}"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        broken = non_finite_weights(pl_module)
        if not trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            return
        listed = ", ".join(broken[:2]) + (f" and {len(broken) - 2} more" if len(broken) > 2 else "")
        raise UserError(
            f"step {trainer.global_step}: trained weights are not finite ({listed or 'of another process'}), so no "
            f"checkpoint is written; {_advice(trainer, pl_module)}; {_last_checkpoint(trainer)}"
        )


def non_finite_weights(module: torch.nn.Module) -> list[str]:
    """The names of trained parameters with a value that is not finite."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained:
        return []
    finite = torch.stack([p.detach().isfinite().all() for _, p in trained]).tolist()
    return [name for (name, _), fine in zip(trained, finite) if not fine]


def _finite(values: Sequence[Tensor]) -> bool:
    return not values or bool(torch.stack([value.detach().float().mean() for value in values]).isfinite().all())


def _losses(trainer: pl.Trainer, outputs: Any) -> list[Tensor]:
    """The loss that was minimised or, where a model steps its optimizers by hand, all that it logged."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return [loss] if isinstance(loss, Tensor) else list(_logged(trainer).values())


def _logged(trainer: pl.Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def _losses_text(trainer: pl.Trainer) -> str:
    logged = _logged(trainer)
    known = {text: logged[name] for name, text in NAMES.items() if name in logged}
    return ", ".join(f"{name} {float(value):.4g}" for name, value in (known or logged).items()) or "not logged"


def _batch_text(trainer: pl.Trainer, batch: Any) -> str:
    """The captions of a batch and what they belong to: files where they are known, else positions and seeds."""
    examples = getattr(trainer.train_dataloader, "dataset", None)
    subject, prior = (examples.subject, examples.prior) if isinstance(examples, Examples) else (None, None)
    halves = dict(zip(("subject", "prior"), [batch] if isinstance(batch, Mapping) else batch))
    streams = {"subject": subject, "prior": prior}
    return "; ".join(
        f"{name}: {', '.join(_examples_text(trainer, half, streams[name]))}"
        for name, half in halves.items()
        if isinstance(half, Mapping)
    )


def _examples_text(trainer: pl.Trainer, half: Mapping[str, Any], stream: Stream | None) -> Iterable[str]:
    seeds = half.get("noise_seed")
    captions = half.get("caption") or [""] * (0 if seeds is None else len(seeds))
    for index, caption in list(enumerate(captions))[:SHOWN]:
        seed = None if seeds is None else int(seeds[index])
        yield f'"{caption}" ({_source(trainer, index, seed, len(captions), stream)})'
    if len(captions) > SHOWN:
        yield f"and {len(captions) - SHOWN} more"


def _source(trainer: pl.Trainer, index: int, seed: int | None, size: int, stream: Stream | None) -> str:
    """Where an example is from: its file or, if that cannot be told, its position in the run or its noise seed."""
    position = _position(trainer, index, size)
    if position is None or stream is None or seed != derive_seed(stream.seed, "noise", stream.role, position):
        return f"noise seed {seed}"
    paths = getattr(stream.dataset, "paths", None)
    if not isinstance(paths, Sequence):
        return f"position {position}, noise seed {seed}"
    return str(paths[stream.index(position) % len(paths)])


def _position(trainer: pl.Trainer, index: int, size: int) -> int | None:
    """The position in the run of the `index`-th example of the batch that was just processed."""
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, PositionBatches):
        return None
    number = trainer.fit_loop.epoch_loop.batch_progress.total.processed - 1  # type: ignore[attr-defined]
    return (number * sampler.world_size + sampler.rank) * size + index


def _advice(trainer: pl.Trainer, pl_module: Any) -> str:
    """What usually helps."""
    rate = getattr(pl_module, "learning_rate", None)
    lower = "a lower model.base_learning_rate" + (f" (it was {rate:.3g})" if isinstance(rate, float) else "")
    precision = str(trainer.precision)
    if precision.startswith("16"):
        return f"{lower} usually helps, or --precision bf16-mixed or 32-true, which do not overflow"
    if precision.startswith("bf16"):
        return f"{lower} usually helps, or --precision 32-true"
    return f"{lower} usually helps, or --gradient_clip_val 1"


def _last_checkpoint(trainer: pl.Trainer) -> str:
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, CheckpointKeeper)]
    if not keepers or not keepers[0].last_path.exists():
        return "there is no checkpoint from before"
    return f"the last good checkpoint is {keepers[0].last_path}"
