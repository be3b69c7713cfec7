"""The golden files' model with other parameters, batches for it, and what trains it in a moment."""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.rng import SampleRandom
from ldm.util import instantiate_from_config
from tests.support import golden

SIZE = 16  # of images, the side
UNET = golden.CONFIG["unet_config"]["params"]
# Two levels and a layer of each kind, for tests that are not about the UNet.
SMALL_UNET = {"channel_mult": [1, 1], "attention_resolutions": [], "use_checkpoint": False}
SCHEDULE = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


def build(unet: dict | None = None, text: dict | None = None, **overrides: Any) -> Any:
    """Build the golden files' model with other parameters: of the UNet, the text encoder, or
    itself.
    """
    unet_config, text_config = golden.CONFIG["unet_config"], golden.CONFIG["cond_stage_config"]
    params = {
        **golden.CONFIG,
        "unet_config": {"target": unet_config["target"], "params": {**UNET, **(unet or {})}},
        "cond_stage_config": {
            "target": text_config["target"],
            "params": {"text_config": golden.TEXT_CONFIG, **(text or {})},
        },
        **overrides,
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    model = instantiate_from_config({"target": target, "params": params}, "model")
    golden.load_golden_weights(model)
    return model.train()


def batch(*seeds: int, caption: str = "photo of a sks dog") -> dict[str, Any]:
    """Make images, captions and noise seeds that are a function of each sample's seed."""
    images = SampleRandom(seeds).randn((len(seeds), SIZE, SIZE, 3)).clamp(-2, 2) / 2
    captions = [f"{caption} {seed}" for seed in seeds]
    return {"image": images, "caption": captions, "noise_seed": list(seeds)}


def step(model: Any, *parts: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the log of one training step, of a subject or of subject and prior."""
    return model.shared_step(parts if len(parts) > 1 else parts[0], "train")


def gradients(model: Any, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and every gradient of one training step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = step(model, batch(1), batch(2))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def in_float64(model: Any, monkeypatch: Any) -> Any:
    """Return a model that computes without rounding, for the rest of a test."""

    def embedding(t: Tensor, dim: int) -> Tensor:
        angles = t[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        return torch.cat([angles.cos(), angles.sin()], 1)

    monkeypatch.setattr("ldm.modules.diffusionmodules.openaimodel.timestep_embedding", embedding)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return model.double()


def unet_of(model: Any) -> dict[str, Tensor]:
    """Return a copy of the UNet's weights."""
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def averaged(model: Any) -> Any:
    """Move a model's UNet 1 away from its EMA weights."""
    model.model_ema = type(model.model_ema)(model.model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += 1
    return model


def unet_inputs(channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, time steps and a text embedding for the golden UNet."""
    random = SampleRandom([0, 1])
    return random.randn((2, channels, 8, 8)), torch.tensor([3, 800]), random.randn((2, 77, 32))


def small_trainer(**options: Any) -> pl.Trainer:
    """Make a trainer that writes nothing."""
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def loader(*batches: Any) -> torch.utils.data.DataLoader:
    """Make a data loader of whole batches."""
    return torch.utils.data.DataLoader(batches, batch_size=None)


def groups_of(model: nn.Module) -> list[tuple[str | None, float, int]]:
    """Return name, rate and number of parameters of a model's optimizer's groups."""
    model.learning_rate = 1e-3
    groups = model.configure_optimizers().param_groups
    return [(group.get("name"), group["lr"], len(group["params"])) for group in groups]


def parts_that_moved(first: dict[str, Tensor], last: dict[str, Tensor]) -> set[str]:
    """Return the networks of which two state dicts hold other weights."""
    return {key.split(".")[0] for key in first if not torch.equal(first[key], last[key])}


def with_own_parts(module: nn.Module) -> nn.Module:
    """Return a module with the same weights, whose parts can be replaced."""
    made = copy.copy(module)
    parts = module.named_children()
    made._modules = {name: with_own_parts(part) for name, part in parts}
    return made
