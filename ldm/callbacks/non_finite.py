"""A loss or a weight that is not finite ends the run, before a checkpoint could hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerStatus
from torch import Tensor

from ldm.data.streams import Examples, PositionBatches, Positions
from ldm.errors import UserError
from ldm.modules.losses.batch import RawBatch, named_parts
from ldm.rng import derive_seed

NAMES = {"train/loss": "subject", "train/loss_prior": "prior"}
SHOWN = 8  # examples of the subject and of the prior each that the error lists


class StopOnNonFinite(pl.Callback):
    """Raise a `UserError` for a loss that is not finite, and instead of writing such weights.

    The loss is read before its backward pass, while the weights are those of the step before, which
    can still be saved. All processes stop together.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if pl_module.automatic_optimization:
            number = _batches_done(trainer)
            self._check(trainer, pl_module, [loss], trainer.global_step + 1, number)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        # A model that steps its optimizers by hand has several losses, all of which it logs.
        if not pl_module.automatic_optimization:
            number = _batches_done(trainer) - 1
            losses = list(_logged(trainer).values())
            self._check(trainer, pl_module, losses, trainer.global_step, number)
        self._batch = None

    def _check(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        losses: Sequence[Tensor],
        step: int,
        number: int,
    ) -> None:
        """Compare the losses of batch `number` of the run, on all processes."""
        here = not _finite(losses)
        if not trainer.strategy.reduce_boolean_decision(here, all=False):
            return
        if not here:
            raise UserError(f"step {step}: stopped, for another process's loss is not finite")
        raise UserError(
            f"step {step}: the loss is not finite ({_losses_text(trainer)}), "
            f"of the batch {_batch_text(trainer, self._batch, number)}; "
            f"{_advice(trainer, pl_module)}"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        broken = non_finite_weights(pl_module)
        some = bool(broken)
        if trainer.state.status != TrainerStatus.INTERRUPTED:  # after an error nobody else answers
            some = trainer.strategy.reduce_boolean_decision(some, all=False)
        if not some:
            return
        listed = ", ".join(broken[:2])
        listed += f" and {len(broken) - 2} more" if len(broken) > 2 else ""
        raise UserError(
            f"step {trainer.global_step}: trained weights are not finite "
            f"({listed or 'of another process'}), so no checkpoint is written; "
            f"{_advice(trainer, pl_module)}"
        )


def non_finite_weights(module: torch.nn.Module) -> list[str]:
    """Return the names of trained parameters with a value that is not finite."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained:
        return []
    finite = torch.stack([p.detach().isfinite().all() for _, p in trained]).tolist()
    return [name for (name, _), fine in zip(trained, finite) if not fine]


def _finite(values: Sequence[Tensor]) -> bool:
    return not values or bool(
        torch.stack([value.detach().float().mean() for value in values]).isfinite().all()
    )


def _logged(trainer: pl.Trainer) -> dict[str, Tensor]:
    return {
        name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")
    }


def _losses_text(trainer: pl.Trainer) -> str:
    logged = _logged(trainer)
    known = {text: logged[name] for name, text in NAMES.items() if name in logged}
    return (
        ", ".join(f"{name} {float(value):.4g}" for name, value in (known or logged).items())
        or "not logged"
    )


def _batch_text(trainer: pl.Trainer, batch: RawBatch, number: int) -> str:
    """Quote the captions of a batch, each with its file or else its position and seed."""
    examples = getattr(trainer.train_dataloader, "dataset", None)
    subject, prior = (
        (examples.subject, examples.prior) if isinstance(examples, Examples) else (None, None)
    )
    batches = named_parts(batch)
    streams = {"subject": subject, "prior": prior}
    return "; ".join(
        f"{name}: {', '.join(_examples_text(trainer, part, streams[name], number))}"
        for name, part in batches.items()
        if isinstance(part, Mapping)
    )


def _examples_text(
    trainer: pl.Trainer, part: Mapping[str, Any], stream: Positions | None, number: int
) -> Iterable[str]:
    seeds = part.get("noise_seed")
    captions = part.get("caption") or [""] * (0 if seeds is None else len(seeds))
    for index, caption in list(enumerate(captions))[:SHOWN]:
        seed = None if seeds is None else int(seeds[index])
        position = _position(trainer, number, index, len(captions))
        yield f'"{caption}" ({_source(position, seed, stream)})'
    if len(captions) > SHOWN:
        yield f"and {len(captions) - SHOWN} more"


def _source(position: int | None, seed: int | None, positions: Positions | None) -> str:
    """Return an example's file, or else its position in the run or its noise seed."""
    if position is None or positions is None:
        return f"noise seed {seed}"
    # Of several subjects, each has a stream of its own.
    stream, position = positions.at(position)
    if seed != derive_seed(stream.seed, "noise", stream.role, position):
        return f"noise seed {seed}"
    paths = getattr(stream.dataset, "paths", None)
    if not isinstance(paths, Sequence):
        return f"position {position}, noise seed {seed}"
    return str(paths[stream.index(position) % len(paths)])


def _position(trainer: pl.Trainer, number: int, index: int, size: int) -> int | None:
    """Return the position in the run of the `index`-th example of batch `number`."""
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, PositionBatches):
        return None
    return (number * sampler.world_size + sampler.rank) * size + index


def _batches_done(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def _advice(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Say what usually helps."""
    rate = getattr(pl_module, "learning_rate", None)
    lower = "a lower model.base_learning_rate" + (
        f" (it was {rate:.3g})" if isinstance(rate, float) else ""
    )
    precision = str(trainer.precision)
    if precision.startswith("16"):
        return f"{lower} usually helps, or --precision bf16-mixed or 32-true, which do not overflow"
    if precision.startswith("bf16"):
        return f"{lower} usually helps, or --precision 32-true"
    return f"{lower} usually helps, or --gradient_clip_val 1"
