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
from ldm.sampling.precision import computing_in, halve
from ldm.sampling.read_ahead import read_ahead
from ldm.sampling.series import Batch, Picture
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

    def read(self) -> None:
        """Do what a command does once before it draws."""

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
        # What only the first text takes, such as imports, is no part of the time.
        with torch.no_grad(), computing_in(self.model, self.precision):
            self.model.get_learned_conditioning([PROMPT] * settings.batch)

    def read(self) -> None:
        pictures = (Picture(PROMPT, self.recipe(steps=1)),) * self.settings.batch
        batch = Batch(pictures, tuple(range(len(pictures))))
        read_ahead(self.model, [batch], self.precision)

    def recipe(self, steps: int) -> Recipe:
        """Return how a picture is drawn."""
        return Recipe(steps, GUIDANCE, height=self.side, width=self.side)

    def draw(self, steps: int) -> None:
        prompts, seeds = [PROMPT] * self.settings.batch, range(self.settings.batch)
        recipe = self.recipe(steps)
        text_to_image(self.model, prompts, seeds, recipe, precision=self.precision)


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

    def read(self) -> None:
        pass  # its pipeline reads the texts whenever it draws

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
        now = _clock(settings, device)
        # A command reads once, so this can be measured only once.
        start = now()
        reading = _counted(program.read)
        read_seconds = now() - start
        # These warm up, too.
        one = _counted(lambda: program.draw(1))
        two = _counted(lambda: program.draw(2))
        timed = _timed(program, settings, now, read_seconds)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    flops = reading + one + (settings.steps - 1) * (two - one)
    return {**timed, "peak_bytes": peak_memory_bytes(device) - before, "flops": flops}


def _clock(settings: Settings, device: torch.device) -> Callable[[], float]:
    """Return what gives the seconds, once the device has done all that it was told."""

    def now() -> float:
        synchronize(device)
        return CLOCKS[settings.clock]()

    return now


def _counted(work: Callable[[], object]) -> int:
    """Count the floating-point operations of some work."""
    with counting_flops() as counter:
        work()
    return counter.get_total_flops()


def _timed(
    program: Program, settings: Settings, now: Callable[[], float], read_seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of a batch, with those of reading its texts, and of a denoising step."""
    span = UNetSpan(program.unet, now)
    start = now()
    program.draw(settings.steps)
    seconds = now() - start + read_seconds
    assert span.first is not None, "no UNet ran"
    return {"seconds": [seconds], "step_seconds": [(span.last - span.first) / settings.steps]}
