"""What the suite asks of a trainer. To test another trainer, write this file for it.

The suite hands over a `Case` and examples. `Adapter` says what the trainer's networks predict, which
random numbers an example has, and what one optimizer step of the trainer really computed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.rng import SampleRandom, derive_seed
from ldm.util import instantiate_from_config
from tests.support import families, golden
from tests.support.models import loader, small_trainer
from tests.support.runs import same
from tests.support.together import of_torchrun, together

SMALLEST = -30.0  # a posterior's log variance


@dataclass(frozen=True)
class Case:
    """A way to train. `params` are of the loss, by the names of our `LatentDiffusion`."""

    family: str = "v1"
    method: str = "class_images"
    lora: bool = False
    precision: str = "64-true"
    accumulated: int = 1
    processes: int = 1  # that share a step; each takes every so many-th batch
    masks: bool = False
    words: int = 0  # vectors of the new word "sks", which alone train
    sizes: tuple[int, int] = (2, 2)  # examples of the subject and of the prior
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Examples of the subject or of the prior: latents (b, z, h, w), of seeds."""

    latents: Tensor
    captions: list[str]
    seeds: list[int]
    class_captions: list[str] | None = None
    masks: Tensor | None = None  # at the size of the latents


@dataclass(frozen=True)
class Found:
    """What an optimizer step was: its loss, its gradients by name, the captions encoded, and whether
    all processes ended with the same gradients.
    """

    loss: float
    gradients: dict[str, Tensor]
    captions: list[list[str]]
    is_shared: bool = True


class _Watch(pl.Callback):
    """Keeps the gradients and the losses of the first optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        named = model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


class Adapter:
    """Our trainer: `LatentDiffusion`, trained by Lightning."""

    def __init__(self, case: Case):
        self.case = case
        self.dtype = dtype = torch.float64 if case.precision == "64-true" else torch.float32
        more = {"lora": {"rank": 2}, "use_ema": False} if case.lora else {"use_ema": False}
        small = families.params(case.family) | {"cond_stage_trainable": not _is_open(case)}
        small["unet_config"]["params"] |= {
            "channel_mult": [1], "attention_resolutions": [1], "num_res_blocks": 1,
            "use_checkpoint": False,
        }  # fmt: skip
        text = small["cond_stage_config"]
        text["params"] = {**text["params"], "max_length": 12}
        given = small | more | case.params | {"preservation": case.method}
        if case.words:
            named = {"placeholder_strings": ["sks"], "num_vectors_per_token": case.words}
            manager = "ldm.modules.embedding_manager.EmbeddingManager"
            given["personalization_config"] = {"target": manager, "params": named}
        self.model = build_model(given).to(dtype)
        # The networks before the training, then as they are after some of it.
        self.model.configure_model()
        self.before = self._networks()
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    drawn = torch.randn(parameter.shape, generator=noise)
                    parameter += 0.05 * drawn.to(parameter)
        self.now = self._networks()

    def _networks(self) -> nn.ModuleDict:
        """Return a copy of what predicts, as it is now."""
        parts = {n: getattr(self.model, n) for n in ("model", "cond_stage_model")}
        if self.case.words:
            parts["embedding_manager"] = self.model.embedding_manager
        # At once: the text encoder reads the words' rows from their own module.
        return copy.deepcopy(nn.ModuleDict(parts)).double()

    def draws(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Return each example's scaled latent, time step and noise."""
        # A run in float64 draws in it, too.
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            return self._draws(part)
        finally:
            torch.set_default_dtype(before)

    def _draws(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        random, shape = SampleRandom(part.seeds), part.latents.shape
        sampled = part.latents + math.exp(SMALLEST / 2) * random.randn(shape).double()
        t = random.randint(1000, len(part.seeds))
        noise = random.randn(shape).double()
        if strength := self.case.params.get("offset_noise"):
            own = [derive_seed("offset", seed) for seed in part.seeds]
            noise = noise + strength * SampleRandom(own).randn((*shape[:2], 1, 1)).double()
        return self.model.scale_factor * sampled, t, noise

    def predict(self, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what the networks predict that are trained."""
        return predicted(self.now, x, t, captions)

    @torch.no_grad()
    def predict_before(self, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what they predicted before the training."""
        return predicted(self.before, x, t, captions)

    def parameters(self) -> dict[str, Tensor]:
        """Return what `predict` is a function of and what is trained."""
        return {n: p for n, p in self.now.named_parameters() if p.requires_grad}

    def step(self, batches: Sequence[Sequence[Part]]) -> Found:
        """Take one optimizer step over some batches and say what it was."""
        count = self.case.processes
        if count == 1:
            return self._step(batches)
        # The processes are forks of this one, and leave behind what each has found.
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def job(rank: int) -> None:
                found = self._step(batches[rank::count], devices=count, strategy="ddp")
                torch.save(dataclasses.asdict(found), folder / f"{rank}.pt")

            together(folder, job, of_torchrun)
            files = [folder / f"{rank}.pt" for rank in range(count)]
            parts = [Found(**torch.load(file)) for file in files]
        first, *others = parts
        is_shared = all(same(other.gradients, first.gradients) for other in others)
        loss = sum(part.loss for part in parts) / count
        captions = [texts for part in parts for texts in part.captions]
        return Found(loss, first.gradients, captions, is_shared)

    def _step(self, batches: Sequence[Sequence[Part]], **options: Any) -> Found:
        """Take the step, as one process."""
        seen: list[list[str]] = []
        encoder, watch = self.model.cond_stage_model, _Watch()
        hook = encoder.register_forward_pre_hook(lambda _, args: seen.append(list(args[0])))
        entries = [tuple(_entries(part, self.dtype) for part in batch) for batch in batches]
        data = loader(*(parts if len(parts) > 1 else parts[0] for parts in entries))
        trainer = small_trainer(
            max_steps=1, callbacks=[watch], accumulate_grad_batches=len(batches),
            precision=self.case.precision, use_distributed_sampler=False, **options,
        )  # fmt: skip
        trainer.fit(self.model, data)
        hook.remove()
        # Lightning has divided each by the number of batches.
        return Found(sum(watch.losses), watch.gradients, seen)


def build_model(params: dict[str, Any]) -> Any:
    """Return our model with weights that are a function of their names."""
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    model = instantiate_from_config({"target": target, "params": params}, "model")
    golden.load_golden_weights(model)
    return model.train()


def predicted(networks: nn.ModuleDict, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
    """Return the UNet's output."""
    cond = networks["cond_stage_model"](list(captions))
    return networks["model"](x, t, c_crossattn=[cond])


def _is_open(case: Case) -> bool:
    """Return whether open_clip's text encoder has adapters to train: it takes none."""
    return case.lora and "v2" in case.family


def _entries(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """Return a part as our data loader yields it, with posteriors of hardly any variance."""
    moments = torch.cat([part.latents, torch.full_like(part.latents, SMALLEST)], dim=1)
    found = {"moments": moments.to(dtype), "caption": part.captions, "noise_seed": part.seeds}
    if part.class_captions is not None:
        found["class_caption"] = part.class_captions
    return found if part.masks is None else found | {"mask": part.masks.to(dtype)}
