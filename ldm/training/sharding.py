"""FSDP: every process holds a part of the weights, and the checkpoints are those of a run that is
not sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from pytorch_lightning.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    MixedPrecision,
    OptimStateKeyType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType as Kind
from torch.optim import Optimizer

from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    import pytorch_lightning as pl

WHERE = "lightning.trainer.strategy"
OURS = "ldm.training.sharding.FullySharded"
KINDS = ("FULL_SHARD", "SHARD_GRAD_OP")
OPTIMIZERS = (
    "adam",
    "adamw",
)  # whose state has the shape of the weights, and may be computed of any part of them


def make_strategy(given: object) -> Any:
    """Return the strategy that the config names: ours for `fsdp`, that of a `target`, else
    Lightning's.

    Raises:
        UserError: a strategy whose checkpoints would not be single files.
    """
    if isinstance(given, Mapping):
        return instantiate_from_config(given, WHERE)
    if given == "fsdp":
        return FullySharded()
    if isinstance(given, str) and given.startswith("deepspeed"):
        raise UserError(
            f"{WHERE}: {given}: its checkpoints are folders: use fsdp, which shards as much"
        )
    if isinstance(given, str) and given.startswith("fsdp"):
        raise UserError(
            f"{WHERE}: {given}: use fsdp, or {{target: {OURS}, params: {{...}}}} with its options"
        )
    return given


def gathered_together(model: LatentDiffusion) -> set[nn.Module]:
    """Return the modules whose weights are gathered and freed together.

    They are the UNet's and the text encoder's blocks, and what is around those in either.
    """
    unet = [
        module for module in model.model.modules() if isinstance(module, TimestepEmbedSequential)
    ]
    lists = [
        module for module in model.cond_stage_model.modules() if isinstance(module, nn.ModuleList)
    ]
    return {
        model.model,
        model.cond_stage_model,
        *unet,
        *(block for blocks in lists for block in blocks),
    }


def check_shardable(model: pl.LightningModule) -> None:
    """Raise a `UserError` for what needs the whole weights on every process."""
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"{WHERE}: fsdp: shards latent diffusion models, not {type(model).__name__}: use ddp"
        )
    excluded = {
        "use_ema=true": model.model_ema is not None,
        "lora": model.lora is not None,
        "personalization_config": model.embedding_manager is not None,
        "text_encoder_stop": model.text_training.stop is not None,
        "preservation, which copies the weights": model.preservation.chosen.needs_teacher,
        f"optimizer={model.optimizer}": model.optimizer not in OPTIMIZERS,
    }
    found = [f"model.params.{name}" for name, given in excluded.items() if given]
    if found:
        raise UserError(f"{WHERE}: fsdp: not with {', '.join(found)}: use ddp, or leave it out")


class FullySharded(FSDPStrategy):
    """Lightning's FSDP for `LatentDiffusion`, with the checkpoints of every other strategy: one
    file, CompVis's keys.

    The autoencoder, which is small and never trained, is whole on every process. Weights are
    gathered in float32 and computed with in autocast, as without sharding.

    Args:
        sharding_strategy: what is sharded: FULL_SHARD weights, gradients and optimizer;
            SHARD_GRAD_OP all but the weights while a step is computed, which costs memory and saves
            time.

    Raises:
        UserError: another `sharding_strategy`.
    """

    def __init__(self, sharding_strategy: str = "FULL_SHARD"):
        if sharding_strategy not in KINDS:
            accepted = ", ".join(KINDS)
            raise UserError(
                f"{WHERE}: unknown sharding_strategy '{sharding_strategy}'; accepted: {accepted}"
            )
        # Lightning's own mixed precision would round the noise schedule, which are buffers.
        super().__init__(
            sharding_strategy=sharding_strategy,  # type: ignore[arg-type]
            mixed_precision=MixedPrecision(),
        )

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = (
            None if plugin is None else ShardedPrecision(plugin.precision, self)
        )

    # Weights are restored before the model is sharded, as without sharding, and the optimizer's
    # state afterwards.
    restore_checkpoint_after_setup = False  # type: ignore[assignment]
    lightning_restore_optimizer = True  # type: ignore[assignment]
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict

    def _setup_model(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, LatentDiffusion)
        if any(isinstance(module, FSDP) for module in model.modules()):
            return model  # a test after the training
        model.first_stage_model.to(self.root_device)
        chosen = gathered_together(model)
        sharded = FSDP(
            model,
            mixed_precision=self.mixed_precision,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            ignored_modules=[model.first_stage_model],
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module in chosen,
            **self.kwargs,
        )
        model.to(self.root_device)  # all of it is there, but for the module's own idea of it
        with FSDP.summon_full_params(sharded, recurse=False):
            pass  # initialised as the root, so that its networks can also be called alone
        return sharded

    def _whole(self, rank0_only: bool) -> Any:
        """Gather states whole and on the CPU inside, on the first process alone or on all."""
        where = {"offload_to_cpu": True, "rank0_only": rank0_only}
        assert self.model is not None
        return FSDP.state_dict_type(
            self.model,
            Kind.FULL_STATE_DICT,
            FullStateDictConfig(**where),
            FullOptimStateDictConfig(**where),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights; empty but on the first process."""
        assert self.model is not None
        with self._whole(rank0_only=True):
            state = self.model.state_dict()
        # Without the marks that FSDP leaves on tensors, which a safe reader of checkpoints does not
        # know.
        return (
            {name: value.detach().cpu() for name, value in state.items()}
            if self.is_global_zero
            else {}
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state by parameters' numbers, as torch has it; empty but on the first
        process.
        """
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        own = optimizer.state_dict()
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        # One kind of moments at a time: torch gathers all into one buffer, and copies none that is
        # on the CPU already.
        for kind in sorted({kind for values in own["state"].values() for kind in values}):
            part = {number: {kind: values[kind]} for number, values in own["state"].items()}
            with self._whole(rank0_only=True):
                gathered = FSDP.optim_state_dict(self.model, optimizer, {**own, "state": part})
            for name, values in gathered.get("state", {}).items():
                whole["state"].setdefault(name, {}).update(values)
            whole["param_groups"] = gathered.get("param_groups", [])
        if not self.is_global_zero:
            return {}
        return FSDP.rekey_optim_state_dict(
            whole, OptimStateKeyType.PARAM_ID, self.model, optim=optimizer
        )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's parts of a whole state."""
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            named = FSDP.rekey_optim_state_dict(
                state, OptimStateKeyType.PARAM_NAME, self.model, optim=optimizer
            )
            with self._whole(rank0_only=False):
                optimizer.load_state_dict(
                    FSDP.optim_state_dict_to_load(self.model, optimizer, named)
                )


class ShardedPrecision(FSDPPrecision):
    """Lightning's, which knows CUDA alone and cannot clip by the norm."""

    def __init__(self, precision: Any, strategy: FullySharded):
        super().__init__(precision)
        self._strategy = strategy

    def forward_context(self) -> Any:
        if "mixed" not in self.precision:
            return super().forward_context()
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self._strategy.root_device.type, dtype=dtype)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: Any, *_: object, **__: Any) -> None:
        model = self._strategy.model
        assert isinstance(model, FSDP)
        model.clip_grad_norm_(clip_val)


def whole_state(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Return the model's state dict, on the first process; all have to call this."""
    return trainer.strategy.lightning_module_state_dict()
