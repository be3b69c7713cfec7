"""What only a GPU can show to be right: a small model trains in the ways that differ there.

Each check returns `found`, a phrase, and `passes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.benchmark.train import CLOCK, training_config
from ldm.benchmark.train import Settings as Training
from ldm.checkpoints.export import target_of
from ldm.checkpoints.reading import read_checkpoint
from ldm.config import RunConfig
from ldm.host import CUDA, environment_with
from ldm.training.run import Run
from ldm.training.train import train
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

Found = dict[str, Any]
PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# How far a gradient may be from another one, of their size: recomputing repeats the same kernels,
# compiling fuses and so rounds otherwise, a lower precision rounds every product.
SAME, FUSED, ROUNDED = 1e-3, 5e-2, 0.1
# A run that is stopped earlier is to have the same steps until then, and its checkpoint is read.
ALIKE = {
    "model.params.scheduler_config": None,
    "data.params.num_workers": 0,
    "lightning.trainer.enable_checkpointing": True,
    **{f"lightning.callbacks.{name}": None for name in (CLOCK, "run_page", "fixed_loss")},
}


@dataclass(frozen=True)
class World:
    """Where checks train, and what: a config of a small model, which is changed for each."""

    config: Mapping[str, Any]
    device: str
    folder: Path

    def trained(self, name: str, changes: Mapping[str, object], steps: int = 4) -> dict[str, Any]:
        """Train, and return the last checkpoint."""
        return self._until(Run(self.folder / name, "2020-01-01T00-00-00"), changes, steps)

    def resumed(self, name: str, changes: Mapping[str, object], steps: int = 4) -> dict[str, Any]:
        """Go on with a run in a new start of it, and return the last checkpoint."""
        folder = self.folder / name
        run = Run(folder, "2020-01-02T00-00-00", folder / "checkpoints" / "last.ckpt")
        return self._until(run, changes, steps)

    def _until(self, run: Run, changes: Mapping[str, object], steps: int) -> dict[str, Any]:
        """Train to a step on pictures of noise, the same for every run."""
        settings = Training(steps=steps - 1, warmup=0, device=self.device)  # and one more is taken
        images = self.folder / f"{run.folder.name}-{run.stamp}-images"
        config = RunConfig(training_config(self.config, settings, images)).having(ALIKE)
        trained = train(config.having(changes), run)
        assert trained.trainer.global_step == steps
        return read_checkpoint(run.checkpoints / "last.ckpt")


def gradient(world: World, precision: str, unet: Mapping[str, object]) -> tuple[float, Tensor]:
    """Return the loss of a training step, and its gradient as one vector."""
    prefix = "model.params.unet_config.params."
    config = RunConfig(world.config).having({prefix + key: value for key, value in unet.items()})
    torch.manual_seed(0)
    model: LatentDiffusion = instantiate_from_config(target_of(config.content), "model").to(
        world.device
    )
    with torch.no_grad():  # layers that begin at zero would hide what is behind them
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape).to(parameter.device))
    model.train().configure_model()
    size = config.get("data.params.train.params.size")
    images = torch.rand(2, size, size, 3, device=world.device) * 2 - 1
    batch = {"image": images, "caption": ["photo of a sks dog"] * 2, "noise_seed": [1, 2]}
    lower = PRECISIONS.get(precision)
    with torch.autocast(world.device, lower, enabled=lower is not None):
        loss, _ = model.shared_step((batch, {**batch, "noise_seed": [3, 4]}), "train")
    # float16 has no small numbers: a scaler multiplies the loss, and so does this.
    scale = 1024.0 if lower is torch.float16 else 1.0
    (scale * loss).backward()
    found = [p.grad.flatten().float() / scale for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(found)


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def recomputation(world: World, precision: str) -> Found:
    """Compare the gradient of what is recomputed under autocast with that of what is kept."""
    _, kept = gradient(world, precision, {"use_checkpoint": False})
    found = {
        str(value): _distance(gradient(world, precision, {"use_checkpoint": value})[1], kept)
        for value in ("attention", True)
    }
    phrase = ", ".join(f"{name}: {distance:.1e}" for name, distance in found.items())
    return {"found": phrase, "passes": all(d < SAME for d in found.values())}


def autocast(world: World, precision: str) -> Found:
    """Compare a lower precision's gradient with that of float32."""
    distance = _distance(gradient(world, precision, {})[1], gradient(world, "32-true", {})[1])
    return {"found": f"{distance:.1e} from float32", "passes": distance < ROUNDED}


def compiled(world: World, options: Mapping[str, object]) -> Found:
    """Compare a compiled UNet's gradient with that of the same UNet as it is."""
    found = gradient(world, "32-true", {"compile": dict(options) or True})[1]
    distance = _distance(found, gradient(world, "32-true", {})[1])
    return {"found": f"{distance:.1e} from eager", "passes": distance < FUSED}


DETERMINISTIC = {"lightning.trainer.deterministic": True}


def resuming(world: World, precision: str) -> Found:
    """Compare a run that was stopped and resumed with the one that was not, bit by bit."""
    changes = {**DETERMINISTIC, "lightning.trainer.precision": precision}
    straight = world.trained("straight", changes)
    world.trained("parts", changes, steps=2)
    return _bits(world.resumed("parts", changes), straight)


def in_backward(world: World, precision: str) -> Found:
    """Compare AdamW in the backward pass with the fused one behind it, bit by bit."""
    changes = {**DETERMINISTIC, "lightning.trainer.precision": precision}
    key = "model.params.optimizer"
    first, second = (
        world.trained(name, {**changes, key: name}) for name in ("adamw_in_backward", "adamw")
    )
    return _bits(first, second)


def one_process_group(world: World) -> Found:
    """Compare DDP over one process with no DDP, bit by bit; on CUDA it is NCCL's.

    Lightning's DDP takes as many threads as the processor has cores where the variable is not set,
    and sums over more threads are rounded otherwise.
    """
    alone = world.trained("alone", DETERMINISTIC)
    try:
        with environment_with({"OMP_NUM_THREADS": str(torch.get_num_threads())}):
            group = world.trained("group", {**DETERMINISTIC, "lightning.trainer.strategy": "ddp"})
        backend = torch.distributed.get_backend()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    found = _bits(group, alone)
    return {**found, "found": f"{backend}: {found['found']}"}


def _bits(first: Mapping[str, Any], second: Mapping[str, Any]) -> Found:
    ours, theirs = first["state_dict"], second["state_dict"]
    other = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    phrase = f"{len(other)} of {len(theirs)} tensors differ" if other else "the same bits"
    return {"found": phrase, "passes": not other}


def synchronizations(world: World) -> Found:
    """Count how often a step makes the processor wait for the GPU, by torch's own warnings."""
    if world.device != CUDA:
        return {"found": "not counted: no GPU", "passes": True}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        counts = [_warned(partial(world.trained, f"sync{n}", {}, n)) for n in (3, 8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    each = (counts[1] - counts[0]) / 5
    return {"found": f"{each:.1f} a step", "passes": True}


def _warned(run: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return sum("synchronizing" in str(warning.message) for warning in caught)
