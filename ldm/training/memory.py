"""How much memory a training needs, before it starts: the networks run on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from ldm.distributed import is_sharded
from ldm.host import CUDA, default_precision
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.layers import plain_layers
from ldm.optim.in_backward import SUFFIX
from ldm.optim.registry import check_name
from ldm.training.build_trainer import needs_gradients

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from ldm.data.datamodule import DataModuleFromConfig

GB = 1e9
CONCERNS = 1e9  # bytes of weights from which on an estimate is worth its seconds
# Bytes that an optimizer keeps for each trained parameter.
STATE_BYTES = {"adamw": 8, "adam": 8, "adamw8bit": 2, "muon": 4}
# Numbers that a block of a text transformer keeps for each token and channel: Korthikanti et al.,
# 2205.05198.
TEXT_NUMBERS = 17
# Blocks that can compute their activations again in the backward pass instead of keeping them.
RECOMPUTABLE = (ResBlock, BasicTransformerBlock)


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the peak of a training step.

    `shared` is the most that gradients and activations take together: a backward pass frees the
    ones while it makes the others.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    shared: int

    @property
    def total(self) -> int:
        """Return what a step takes."""
        return self.weights + self.optimizer + self.shared

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients and activations": self.shared,
        }
        summands = " + ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        return f"about {self.total / GB:.2f} GB ({summands})"


@dataclass(frozen=True)
class Stage:
    """A part of a forward pass: bytes that it keeps for the backward pass, and of its weights'
    gradients.
    """

    activations: int
    gradients: int


def estimate(
    model: LatentDiffusion,
    optimizer: str,
    samples: int,
    side: int,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    device: str = "cpu",
) -> Estimate:
    """Estimate what a `LatentDiffusion` needs to train, without torch's and the driver's own (about
    1 GB).

    Args:
        optimizer: its name in `ldm.optim.registry.OPTIMIZERS`.
        samples: in one pass of the UNet: subject and class images of a batch.
        side: of the images, pixels.
        autocast: the lower precision of a mixed one.
        accumulates: whether a step's gradients are of several passes, so that most of these begin
            beside all of them.
        device: its kind, as torch names it. On a CPU no copies of weights are kept.

    Raises:
        UserError: an optimizer of no known name.
    """
    check_name(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    latent_side = side // model.downsampling
    with nullcontext() if device == "cpu" else plain_layers():
        stages, recomputed = forward_stages(model, samples, latent_side, autocast)
    activations = sum(stage.activations for stage in stages) + recomputed
    if optimizer.endswith(SUFFIX):
        gradients = max((parameter.nbytes for parameter in trained), default=0)
    else:
        gradients = sum(parameter.nbytes for parameter in trained)
    together = accumulates or optimizer.endswith(SUFFIX)
    return Estimate(
        weights=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        optimizer=STATE_BYTES[optimizer.removesuffix(SUFFIX)]
        * sum(parameter.numel() for parameter in trained),
        gradients=gradients,
        activations=activations,
        shared=gradients + activations if together else _most_at_once(stages) + recomputed,
    )


def _most_at_once(stages: Sequence[Stage]) -> int:
    """Return the most that activations and gradients take together during the backward pass."""

    def taken_at(i: int) -> int:
        # The backward pass is at stage i: activations of it and of all before are kept, and it and
        # all behind have gradients.
        activations = sum(stage.activations for stage in stages[: i + 1])
        gradients = sum(stage.gradients for stage in stages[i:])
        return activations + gradients

    return max(taken_at(i) for i in range(len(stages)))


def forward_stages(
    model: LatentDiffusion, samples: int, latent_side: int, autocast: torch.dtype | None = None
) -> tuple[list[Stage], int]:
    """Measure what the text encoder and the UNet's blocks keep for the backward pass, in their
    order.

    Returns:
        the stages, and the bytes that recomputing a checkpointed block adds at most.
    """
    unet = model.model.diffusion_model
    tokens, width = (
        model.cond_stage_model.max_length,
        model.cond_stage_model.token_embedding.weight.shape[1],
    )
    text = 0
    gradients = sum(
        parameter.nbytes
        for parameter in model.cond_stage_model.parameters()
        if parameter.requires_grad
    )
    if model.text_has_gradients:
        blocks = (
            sum(isinstance(module, nn.LayerNorm) for module in model.cond_stage_model.modules())
            // 2
        )
        distinct = min(samples, 2)  # captions, most of which are the same
        text = blocks * TEXT_NUMBERS * distinct * tokens * width * 4
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"):
        state = {
            name: _without_data(value) for name, value in unet.state_dict(keep_vars=True).items()
        }
        x = torch.empty(samples, unet.in_channels, latent_side, latent_side)
        t = torch.zeros(samples, dtype=torch.long)
        context = torch.empty(samples, tokens, width, requires_grad=model.text_has_gradients)
        with (
            torch.enable_grad(),
            torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            classes = () if unet.num_classes is None else (t,)
            stages, recomputed = _stages(unet, state, (x, t, context, *classes))
    return [Stage(text, gradients), *stages], recomputed


def _without_data(value: Tensor) -> Tensor:
    # On the CPU, where the inputs are: the model itself may be on `meta`.
    return torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)


def _stages(
    unet: nn.Module, state: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> tuple[list[Stage], int]:
    """Measure what each of the UNet's blocks keeps, and the most that recomputing one adds."""
    weights = {value.untyped_storage()._cdata for value in state.values()}
    blocks = [
        block
        for child in unet.children()
        for block in (child if isinstance(child, nn.ModuleList) else [child])
    ]
    entered: list[nn.Module] = []
    kept: list[dict[int, Tensor]] = [{}]
    recomputed = [0]

    def begin(module: nn.Module, args: tuple[object, ...]) -> None:
        entered.append(module)
        kept.append({})

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        for value in args:
            if isinstance(value, Tensor):
                kept[-1][value.untyped_storage()._cdata] = value

    def leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
        inside: dict[int, Tensor] = {}
        with _counting([inside]):
            module._forward(*args)
        recomputed.append(_total(inside, weights))

    hooks = [block.register_forward_pre_hook(begin) for block in blocks]
    for module in unet.modules():
        if isinstance(module, RECOMPUTABLE) and module.use_checkpoint:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with _counting(kept):
            output = functional_call(unet, dict(state), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    kept[-1][output.untyped_storage()._cdata] = output
    found, known = [], set(weights)
    for tensors, block in zip(kept, [nn.Identity(), *entered]):  # first what is before all blocks
        gradients = sum(
            parameter.nbytes for parameter in block.parameters() if parameter.requires_grad
        )
        found.append(Stage(_total(tensors, known), gradients))
        known |= (
            tensors.keys()
        )  # of what several keep, the first in the forward pass is the last to let go
    return found, max(recomputed)


@contextmanager
def _counting(kept: list[dict[int, Tensor]]) -> Iterator[None]:
    """Put what autograd keeps for its backward pass into the last of `kept`, by its storage."""

    def pack(value: Tensor) -> Tensor:
        kept[-1][value.untyped_storage()._cdata] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield


def _total(kept: dict[int, Tensor], without: set[int]) -> int:
    return sum(
        value.untyped_storage().nbytes() for key, value in kept.items() if key not in without
    )


def available_bytes(device: torch.device) -> int | None:
    """Return the device memory that nothing uses, in bytes; None where the system does not say."""
    if device.type == CUDA:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes of a model's tensors that take a device's memory already.

    Weights on the CPU that are mapped from a file, and that nothing has written to, take none.
    """
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return held
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return min(held, int(fields["RssAnon"].split()[0]) * 1024)


def of_run(
    trainer: pl.Trainer, model: pl.LightningModule, data: DataModuleFromConfig
) -> Estimate | None:
    """Estimate a run; None for other models, for images of any size and where memory is of no
    concern.
    """
    side = getattr(data.datasets.get("train"), "size", None)
    if (
        not isinstance(model, LatentDiffusion)
        or not side
        or sum(p.nbytes for p in model.parameters()) < CONCERNS
    ):
        return None
    # Of the subject and of the prior, which a teacher may stand for. Its images may be made later.
    has_class = "reg" in data.datasets or getattr(data, "reg", None) is not None
    batches = 2 if model.preservation.chosen.has_prior(has_class) else 1
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
    accumulates = trainer.accumulate_grad_batches > 1
    samples, device = batches * data.batch_size, trainer.strategy.root_device.type
    found = estimate(model, model.optimizer, samples, side, autocast, accumulates, device)
    buckets = found.gradients if trainer.world_size > 1 else 0  # in which DDP exchanges them
    copied = model.preservation.copied_bytes(model)
    return replace(found, shared=found.shared + buckets, weights=found.weights + copied)


def outlook(trainer: pl.Trainer, model: LatentDiffusion, found: Estimate) -> str:
    """Put an estimate into words and, if the device has less, what to do about that."""
    device = trainer.strategy.root_device
    available = available_bytes(device)
    held = held_bytes(model, device)
    if available is None or found.total < available + held:
        return str(found)
    there = f"{(available + held) / GB:.1f} GB are there"
    return f"{found}, but {there}: it will not fit. {advice(trainer, model)}"


def advice(trainer: pl.Trainer, model: LatentDiffusion) -> str:
    """Say in one line what needs less memory."""
    return f"To need less: {'; '.join(switches(trainer, model))}"


def switches(trainer: pl.Trainer, model: LatentDiffusion) -> list[str]:
    """List what a user can still change to need less memory, the cheapest in time and quality
    first.
    """
    optimizer, sharded, device = (
        model.optimizer,
        is_sharded(trainer),
        trainer.strategy.root_device.type,
    )
    unet, trained = (
        model.model.diffusion_model,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    blocks = [module for module in unet.modules() if isinstance(module, RECOMPUTABLE)]
    recomputes_all = all(block.use_checkpoint for block in blocks)
    found = {
        "model.params.unet_config.params.use_checkpoint=true": not recomputes_all,
        "--precision bf16-mixed": (
            not trainer.precision.startswith(("bf16", "16"))
            and default_precision(device) == "bf16-mixed"
        ),
        f"model.params.optimizer={optimizer}{SUFFIX} (-{4 * trained / GB:.1f} GB)": (
            optimizer in ("adamw", "adamw8bit") and not needs_gradients(trainer)
        ),
        f"model.params.optimizer={optimizer.replace('adamw', 'adamw8bit')} "
        f"(-{6 * trained / GB:.1f} GB)": (optimizer in ("adamw", "adamw" + SUFFIX) and not sharded),
        "model.params.cond_stage_trainable=false": model.cond_stage_trainable and not model.lora,
        "configs/stable-diffusion/v1-finetune_lora.yaml": not model.lora and not sharded,
        "data.params.batch_size=1, or smaller images (data.params.train.params.size and "
        "reg.params.size)": True,
    }
    return [switch for switch, left in found.items() if left]
