"""After the first optimizer step: what should train has moved, and nothing else has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.ema import LitEma
from ldm.optim.boundary import at_step_boundary

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

PARTS = {
    "model": "UNet",
    "cond_stage_model": "text encoder",
    "first_stage_model": "autoencoder",
    "embedding_manager": "new words",
}
ADAPTER = "lora_"  # in the names of peft's parameters
WIDTH = 1024  # words in a row of what is summed
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def checksum(values: Tensor) -> Tensor:
    """Return two integers, (2,), that change with any of the bits, but for a rare coincidence.

    They are weighted sums, modulo 2^64, of the rows and of the columns of the bits as a table of
    integers. Nothing is copied.
    """
    words = _words(values.detach())
    full = len(words) // WIDTH
    body, rest = words[: full * WIDTH].view(full, WIDTH), words[full * WIDTH :]
    rows, columns = body.sum(1), body.sum(0)
    weights = 2 * torch.arange(max(full, WIDTH), device=words.device) + 1
    return torch.stack(
        [
            (rows * weights[:full]).sum() + 3 * rest.sum(),
            (columns * weights[:WIDTH]).sum() + 5 * (rest * weights[: len(rest)]).sum(),
        ]
    )


def _words(values: Tensor) -> Tensor:
    """Return the bits of a tensor as a vector of the widest integers that fit."""
    flat = values.reshape(-1)
    sizes = (flat.numel() * flat.element_size(), flat.storage_offset() * flat.element_size())
    return flat.view(
        next(word for word in WORDS if all(size % word.itemsize == 0 for size in sizes))
    )


def part_of(name: str, trained: bool) -> str:
    """Name the part of the network that a parameter belongs to; adapters that are trained are parts
    too.
    """
    child = name.partition(".")[0]
    part = PARTS.get(child, child)
    return f"LoRA adapters of the {part}" if trained and ADAPTER in name else part


class FirstStepCheck(pl.Callback):
    """Compares every tensor before and after the first optimizer step of a new or resumed run.

    The check waits for a step that could move something: one whose learning rate is not 0 and that
    a gradient scaler did not skip. What has not moved is looked at again, at twice the step, while
    the learning rate still rises or no gradient arrives yet (as behind layers that begin at zero).
    It costs two sums over the weights, and no copies.

    Args:
        patience: steps that it waits for gradients, once the learning rate has risen.

    Raises:
        UserError: a frozen tensor has changed, or nothing of a part that should train has.
    """

    def __init__(self, patience: int = 8):
        self.patience = patience
        self._before: dict[str, Tensor] | None = None
        self._frozen: set[str] = set()
        self._rate = 0.0
        self._steps = 0
        self._next = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Sharded strategies have other tensors than the model's.
        if isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            self._before = {name: checksum(value) for name, value in _tensors(pl_module)}
            # As of now: a part may stop to train before a step is looked at.
            self._frozen = self._before.keys() - {
                n for n, p in pl_module.named_parameters() if p.requires_grad
            }
            self._steps, self._next = 0, 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._before is not None:
            self._rate = _rate(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if self._before is None or not at_step_boundary(trainer, batch_idx):
            return
        self._steps += 1
        if self._steps < self._next or _skipped(trainer, pl_module):
            return
        if self._rate == 0 and (self._rises(trainer) or self._steps < self.patience):
            return
        if self._check(trainer, pl_module, self._before):
            self._before = None
        else:
            self._next = 2 * self._steps

    def _check(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, before: Mapping[str, Tensor]
    ) -> bool:
        """Return whether there is nothing more to wait for."""
        still = unchanged(before, pl_module)
        _check_frozen(self._frozen - still, trainer.global_step)
        if not pl_module.automatic_optimization:
            return True  # which of its optimizers steps when is the model's own business
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        stuck = [name for name in trained if name in still]
        pulled = [name for name in stuck if _has_gradient(trained[name], trainer.optimizers)]
        idle = _parts(trained) - _parts(name for name in trained if name not in still)
        if (self._rises(trainer) and (pulled or idle)) or (
            idle - _parts(pulled) and self._steps < self.patience
        ):
            return False
        if idle:
            raise UserError(self._idle_text(trainer, idle, bool(idle & _parts(pulled))))
        if trainer.is_global_zero:
            self._report(trainer.global_step, pulled, len(trained))
        return True

    def _report(self, step: int, pulled: list[str], trained: int) -> None:
        if not pulled:
            log.info("step %d: what should train has moved, and nothing else has", step)
            return
        listed = ", ".join(pulled[:3]) + (", ..." if len(pulled) > 3 else "")
        log.warning(
            "step %d: %d of %d trained tensors had a gradient but did not move: the learning rate, "
            "%.3g, is small for "
            "the precision of their values (%s)",
            *(step, len(pulled), trained, self._rate, listed),
        )

    def _rises(self, trainer: pl.Trainer) -> bool:
        """Return whether the next step's learning rate is larger."""
        return any(_rate(optimizer) > self._rate for optimizer in trainer.optimizers)

    def _idle_text(self, trainer: pl.Trainer, parts: set[str], pulled: bool) -> str:
        named = " and the ".join(sorted(parts))
        where = f"step {trainer.global_step}: the {named} should train, but no weight has moved"
        if pulled:
            return (
                f"{where} at a learning rate of {self._rate:.3g}, which is too small for the "
                "precision of the weights, "
                "or the optimizer does not hold them: raise model.base_learning_rate"
            )
        return (
            f"{where}: no gradient arrives there; freeze it, or see what detaches it from the loss"
        )


def unchanged(before: Mapping[str, Tensor], module: nn.Module) -> set[str]:
    """Return the names of the tensors whose checksums are those of `before`."""
    now = dict(_tensors(module))
    names = [name for name in before if name in now]
    if not names:
        return set()
    equal = torch.stack([(checksum(now[name]) == before[name]).all() for name in names]).tolist()
    return {name for name, same in zip(names, equal) if same}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what is compared: all parameters, and the buffers that training has no reason to
    change.
    """
    yield from module.named_parameters()
    trains = {
        name
        for name, child in module.named_children()
        if any(p.requires_grad for p in child.parameters())
    }
    ema_parts = {name for name, child in module.named_children() if isinstance(child, LitEma)}
    for name, value in module.named_buffers():
        child, _, inside = name.partition(".")
        # A part that trains may keep statistics in its buffers.
        if not inside or child not in trains | ema_parts:
            yield name, value


def _check_frozen(changed: set[str], step: int) -> None:
    if moved := sorted(changed):
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        part = f" ({part_of(moved[0], False)})" if "." in moved[0] else ""
        raise UserError(
            f"step {step}: {moved[0]}{part}{more} is frozen, but has changed: an optimizer holds "
            "it, or something "
            "wrote into it; lightning.callbacks.first_step=null trains nevertheless"
        )


def _parts(names: Iterable[str]) -> set[str]:
    return {part_of(name, True) for name in names}


def _rate(optimizer: Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _has_gradient(parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> bool:
    """Return whether a gradient has arrived, also one that AdamW has used and freed since."""
    if parameter.grad is not None:
        return bool(parameter.grad.any())
    states = [optimizer.state.get(parameter, {}) for optimizer in optimizers]
    return any(bool(state["exp_avg"].any()) for state in states if "exp_avg" in state)


def _skipped(trainer: pl.Trainer, module: nn.Module) -> bool:
    """Return whether the gradient scaler of float16 found an overflow and left the weights
    alone.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return (
        not bool(torch.stack([grad.isfinite().all() for grad in gradients]).all())
        if gradients
        else False
    )
