"""Sampling, measured: this project's `text_to_image`, and diffusers' pipeline with the same
sampler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ldm.benchmark.machine import CLOCKS, counting_flops, synchronize
from ldm.benchmark.reference import diffusers_networks
from ldm.callbacks.timing import peak_memory_bytes, resident_bytes
from ldm.checkpoints.export import DTYPES, target_of
from ldm.checkpoints.pipeline_folder import save_tokenizer
from ldm.config import load_config, to_plain
from ldm.sampling.precision import halve
from ldm.sampling.text_to_image import Recipe, load_model, text_to_image
from ldm.util import instantiate_from_config

PROMPT = "photo of a dog on the beach"
GUIDANCE = 7.5


@dataclass(frozen=True)
class Settings:
    """What is sampled, and how that is measured; `size` in pixels, by default the model's."""

    steps: int = 20
    batch: int = 4
    size: int | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    clock: str = "wall"
    compile: bool = False  # ours alone


class Program(Protocol):
    """Something that draws pictures with a UNet."""

    unet: torch.nn.Module

    def draw(self, steps: int) -> None:
        """Draw a batch of pictures."""


class Ours:
    """`load_model` and `text_to_image`; below float32 all of the networks are in that precision."""

    def __init__(self, config: Path, weights: Path, settings: Settings):
        self.settings, self.dtype = settings, DTYPES[settings.dtype]
        lower = None if self.dtype is torch.float32 else self.dtype
        self.model = load_model(weights, config, settings.device, dtype=lower)
        self.precision = "full"
        if lower is not None:
            halve(self.model, lower)
            self.precision = "half"
        if settings.compile:
            self.model.model.diffusion_model.compile_for_sampling()
        self.unet = self.model.model.diffusion_model
        self.side = settings.size or self.model.image_size * self.model.downsampling

    def draw(self, steps: int) -> None:
        batch, recipe = (
            self.settings.batch,
            Recipe(steps, GUIDANCE, height=self.side, width=self.side),
        )
        prompts = [PROMPT] * batch
        text_to_image(self.model, prompts, range(batch), recipe, precision=self.precision)


class Diffusers:
    """`StableDiffusionPipeline` with DDIM, all of it in the precision; its weights are random."""

    def __init__(self, config: Path, weights: Path, settings: Settings):
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTokenizer

        networks = diffusers_networks(to_plain(load_config([config])))
        embedder = networks.embedder
        with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
            save_tokenizer(Path(folder) / "tokenizer", embedder.max_length, embedder.pad)
            words = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
        pipeline: Any = StableDiffusionPipeline(
            vae=networks.vae.eval(),
            text_encoder=networks.text_encoder.eval(),
            tokenizer=words,
            unet=networks.unet.eval(),
            scheduler=DDIMScheduler.from_config(networks.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(settings.device, DTYPES[settings.dtype])
        self.settings, self.unet = settings, networks.unet

    def draw(self, steps: int) -> None:
        side, prompts = self.settings.size, [PROMPT] * self.settings.batch
        self.pipeline(prompts, side, side, num_inference_steps=steps, guidance_scale=GUIDANCE)


PROGRAMS: dict[str, Callable[[Path, Path, Settings], Program]] = {
    "ours": Ours,
    "diffusers": Diffusers,
}


class UNetSpan:
    """When the UNet's first forward pass began and its latest ended."""

    def __init__(self, unet: torch.nn.Module, now: Callable[[], float]):
        self.first: float | None = None
        self.last, self._now = 0.0, now
        unet.register_forward_pre_hook(self._begins)
        unet.register_forward_hook(self._ends)

    def _begins(self, *_: object) -> None:
        if self.first is None:
            self.first = self._now()

    def _ends(self, *_: object) -> None:
        self.last = self._now()


def measure_sampling(kind: str, config: Path, weights: Path, settings: Settings) -> dict[str, Any]:
    """Measure what a batch of pictures takes, in this process.

    Returns:
        `seconds` of the batch, `step_seconds` of a denoising step, `peak_bytes` (on a CPU beyond
        what the imported packages take), `flops` of the batch; or `failed`, if the GPU's memory did
        not suffice.
    """
    torch.set_num_threads(settings.threads)
    with torch.device("meta"):
        instantiate_from_config(
            target_of(to_plain(load_config([config]))), "model"
        )  # imports what the model needs
    device = torch.device(settings.device)
    before = resident_bytes()[0] if device.type == "cpu" else 0
    try:
        program = PROGRAMS[kind](config, weights, settings)
        one, two = _counted(program, 1), _counted(program, 2)  # they warm up, too
        timed = _timed(program, settings, device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    flops = one + (settings.steps - 1) * (two - one)
    return {**timed, "peak_bytes": peak_memory_bytes(device) - before, "flops": flops}


def _counted(program: Program, steps: int) -> int:
    """Count the floating-point operations of a batch."""
    with counting_flops() as counter:
        program.draw(steps)
    return counter.get_total_flops()


def _timed(program: Program, settings: Settings, device: torch.device) -> dict[str, list[float]]:
    def now() -> float:
        synchronize(device)
        return CLOCKS[settings.clock]()

    span = UNetSpan(program.unet, now)
    start = now()
    program.draw(settings.steps)
    seconds = now() - start
    assert span.first is not None, "no UNet ran"
    return {"seconds": [seconds], "step_seconds": [(span.last - span.first) / settings.steps]}
