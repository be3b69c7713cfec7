"""What the suite asks of a trainer. To test another trainer, write this file for it.

The suite hands over a `Case` and examples. `Adapter` says what the trainer's networks predict, which
random numbers an example has, and what one optimizer step of the trainer really computed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.inpainting import RandomMasks
from ldm.rng import SampleRandom, derive_seed
from ldm.util import instantiate_from_config
from tests.support import cascade, families, golden
from tests.support.models import loader, small_trainer
from tests.support.runs import same
from tests.support.together import of_torchrun, together

SMALLEST = -30.0  # a posterior's log variance
# What an example is: a latent that a cache holds, or a picture of a model that needs it whole.
LATENT, PICTURE = (4, 4, 4), (3, 8, 8)
OF_CASCADE = {"pixels": "base", "enlarging": "sr"}


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
    """Examples of the subject or of the prior: latents or pictures (b, c, h, w), of seeds."""

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
        config = config_of(case.family)
        small = config["params"] | {"cond_stage_trainable": not _is_open(case)}
        small["unet_config"]["params"] |= {
            "channel_mult": [1], "attention_resolutions": [], "num_res_blocks": 1,
            "use_checkpoint": False,
        }  # fmt: skip
        text = small["cond_stage_config"]
        text["params"] = {**text["params"], "max_length": 12}
        given = small | more | case.params | {"preservation": case.method}
        if case.words:
            named = {"placeholder_strings": ["sks"], "num_vectors_per_token": case.words}
            manager = "ldm.modules.embedding_manager.EmbeddingManager"
            given["personalization_config"] = {"target": manager, "params": named}
        self.model = build_model({**config, "params": given}).to(dtype)
        self.has_pictures = case.family in (*OF_CASCADE, "v1-inpainting")
        self.shape = PICTURE if self.has_pictures else LATENT
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
        with self._default_dtype():
            random = SampleRandom(part.seeds)
            x = self._scaled(part.latents, random)
            t = random.randint(1000, len(part.seeds))
            noise = random.randn(x.shape).double()
            if strength := self.case.params.get("offset_noise"):
                own = SampleRandom(_seeds("offset", part))
                noise = noise + strength * own.randn((*x.shape[:2], 1, 1)).double()
        return x, t, noise

    def beside(self, part: Part) -> dict[str, list[Tensor]]:
        """Return what the UNet reads of a part beside its noisy latent and its text."""
        with self._default_dtype():
            if self.case.family == "v1-inpainting":
                return {"c_concat": [self._masked(part)]}
            if self.case.family == "enlarging":
                small, levels = self._small(part)
                return {"c_concat": [small], "c_adm": [levels]}
        return {}

    def _masked(self, part: Part) -> Tensor:
        """Return each example's mask, and the latent of the picture without what it hides."""
        count, _, height, width = part.latents.shape
        hidden = RandomMasks().draw(part.seeds, count, height, width).double()
        own = SampleRandom(_seeds("masked image", part))
        seen = self._scaled(part.latents * (1 - hidden), own)
        return torch.cat([F.interpolate(hidden, seen.shape[2:]), seen], 1)

    def _small(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return each example made smaller, with noise, and enlarged; and the level of the noise."""
        side = part.latents.shape[-1]
        small = F.interpolate(
            part.latents, side // cascade.FACTOR, mode="bicubic", antialias=True
        ).clamp(-1, 1)
        # The levels have betas whose roots are evenly spaced, as Stable Diffusion's.
        betas = torch.linspace(1e-5**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
        levels = SampleRandom(_seeds("augmentation level", part)).randint(
            cascade.LEVELS, len(part.seeds)
        )
        a = torch.cumprod(1 - betas, 0)[levels][:, None, None, None]
        noise = SampleRandom(_seeds("augmentation noise", part)).randn(small.shape).double()
        noisy = a.sqrt() * small + (1 - a).sqrt() * noise
        return F.interpolate(noisy, side, mode="bilinear"), levels

    def _scaled(self, x: Tensor, random: SampleRandom) -> Tensor:
        """Return a sample of what the autoencoder makes of pictures; latents have been encoded."""
        deviation: Tensor | float = math.exp(SMALLEST / 2)
        if self.has_pictures:
            posterior = self.model.first_stage_model.encode(x.to(self.dtype))
            x, deviation = posterior.mean.double(), posterior.std.double()
        sampled = x + deviation * random.randn(x.shape).double()
        return self.model.scale_factor * sampled

    @contextlib.contextmanager
    def _default_dtype(self) -> Iterator[None]:
        """Draw in the precision of the run, as the trainer does."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def predict(self, part: Part, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what the networks predict of a part that are trained."""
        return predicted(self.now, x, t, captions, self.beside(part))

    @torch.no_grad()
    def predict_before(self, part: Part, x: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Return what they predicted before the training."""
        return predicted(self.before, x, t, captions, self.beside(part))

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
        entries = [tuple(self._entries(part) for part in batch) for batch in batches]
        data = loader(*(parts if len(parts) > 1 else parts[0] for parts in entries))
        trainer = small_trainer(
            max_steps=1, callbacks=[watch], accumulate_grad_batches=len(batches),
            precision=self.case.precision, use_distributed_sampler=False, **options,
        )  # fmt: skip
        trainer.fit(self.model, data)
        hook.remove()
        # Lightning has divided each by the number of batches.
        return Found(sum(watch.losses), watch.gradients, seen)

    def _entries(self, part: Part) -> dict[str, Any]:
        """Return a part as our data loader yields it; latents as posteriors of hardly any
        variance.
        """
        found: dict[str, Any] = {"caption": part.captions, "noise_seed": part.seeds}
        if self.has_pictures:
            found["image"] = part.latents.permute(0, 2, 3, 1).to(self.dtype)
        else:
            moments = torch.cat([part.latents, torch.full_like(part.latents, SMALLEST)], dim=1)
            found["moments"] = moments.to(self.dtype)
        if part.class_captions is not None:
            found["class_caption"] = part.class_captions
        if part.masks is not None:
            found["mask"] = part.masks.to(self.dtype)
        return found


def config_of(family: str) -> dict[str, Any]:
    """Return the config of a family's small model."""
    if family in OF_CASCADE:
        return cascade.config(OF_CASCADE[family])
    return families.config(family)["model"]


def build_model(config: dict[str, Any]) -> Any:
    """Return our model with weights that are a function of their names."""
    model = instantiate_from_config(config, "model")
    golden.load_golden_weights(model)
    return model.train()


def predicted(
    networks: nn.ModuleDict,
    x: Tensor,
    t: Tensor,
    captions: Sequence[str],
    beside: dict[str, list[Tensor]],
) -> Tensor:
    """Return the UNet's output."""
    cond = networks["cond_stage_model"](list(captions))
    return networks["model"](x, t, c_crossattn=[cond], **beside)


def _is_open(case: Case) -> bool:
    """Return whether open_clip's text encoder has adapters to train: it takes none."""
    return case.lora and "v2" in case.family


def _seeds(name: str, part: Part) -> list[int]:
    """Return the seeds of another stream of each example's random numbers."""
    return [derive_seed(name, seed) for seed in part.seeds]
