"""From a checkpoint to pictures: what every script stands on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ldm.checkpoints.checkpoint import Checkpoint, Config
from ldm.checkpoints.export import shared_config
from ldm.distributed import place_on_machine
from ldm.errors import UserError
from ldm.files import first_line
from ldm.host import CUDA
from ldm.models.diffusion.guidance import Projection
from ldm.modules.attention import texts_read_once
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.rng import SampleRandom, derive_seed
from ldm.sampling.first_stage import decode
from ldm.sampling.pictures import to_pil
from ldm.sampling.precision import computing_in, halve, is_halved
from ldm.sampling.prompting import read_prompts

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Beside
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best that this machine has: CUDA, MPS, CPU.

    Raises:
        UserError: the named one is not there.
    """
    if name is None:
        if torch.cuda.is_available():
            # Of several processes on a machine, each has a GPU of its own as long as they last.
            place = place_on_machine()
            name = f"{CUDA}:{place % torch.cuda.device_count()}" if place else CUDA
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    # Only a number that comes back shows whether a device is there and holds any: `torch.device`
    # accepts any index, and "meta".
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: not on this machine: {str(error).splitlines()[0]}"
        ) from error
    return device


def load_model(
    checkpoint: str | Path,
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    otherwise: Config | None = None,
) -> LatentDiffusion:
    """Return a model to sample from, with a checkpoint's weights, in evaluation mode.

    Args:
        config: its YAML; by default the one that trained it, else that of its family.
        weights: `trained` or `ema`; by default the EMA weights where there are any.
        dtype: of its matrices and convolutions, for sampling under `autocast`; by default they are
            float32.
        otherwise: the config of a checkpoint that does not say its own, and whose weights do not.

    Raises:
        UserError: a file that cannot be read, or a config that does not fit the checkpoint.
    """
    # On a CPU the weights get another layout below: what was read is then freed one by one.
    on_cpu = torch.device(device).type == "cpu"
    # Adapters are merged into the weights, so that what is sampled is always the plain network.
    opened = Checkpoint.open(checkpoint, config, mapped=not on_cpu).merged()
    log.info("%s", opened)
    # Then choose the EMA weights or the trained ones, which no later stage has to know of.
    opened = opened.for_sampling(weights)
    fitting = opened.fitting_config(otherwise)
    model, _ = opened.build(dtype, fitting)
    model.built_from = fitting
    del opened  # the model has its tensors now
    model = model.to(device).eval().requires_grad_(False)
    # On a CPU a step of Stable Diffusion takes a fifth less time so, and a picture's decoding a
    # quarter (docs/benchmarks.md).
    unet = model.model.diffusion_model
    if model.device.type == "cpu" and isinstance(unet, UNetModel):
        unet.use_memory_format(channels_last=True)
        model.first_stage_model.to(memory_format=torch.channels_last)
    return model


@lru_cache(maxsize=1)
def load_guide(model: LatentDiffusion, checkpoint: str, mix: float = 0.0) -> LatentDiffusion:
    """Return the weaker model that guides a tuned one (personalization guidance, 2508.00319).

    The last one is kept, for a series of pictures.

    Args:
        checkpoint: of the base model, from which `model` was tuned.
        mix: how much of the tuned weights is mixed in: 0 is the base model, and 1 would be
            the tuned one, which is classifier-free guidance.

    Raises:
        UserError: a file that cannot be read, or a model of another kind.
    """
    # The guide computes as the tuned model does, so that only the weights differ.
    unet = model.model.diffusion_model
    dtype = next(p.dtype for p in unet.parameters() if p.ndim > 1)
    # A base model's file may not say its config: then it is that of the model tuned from it.
    config = shared_config(model.built_from)
    guide = load_model(checkpoint, device=model.device, dtype=dtype, otherwise=config)
    if is_halved(model):
        halve(guide, dtype)
    # Outputs that mean something else, or at another noise level, cannot be compared.
    problem = ""
    if guide.parameterization != model.parameterization:
        problem = f"predicts {guide.parameterization}, not {model.parameterization}"
    elif not torch.equal(guide.schedule.alphas_cumprod, model.schedule.alphas_cumprod):
        problem = "has another noise schedule"
    # Compare every weight's shape, and mix where that is wanted.
    for part in ("model", "cond_stage_model"):
        tuned, base = (dict(getattr(m, part).named_parameters()) for m in (model, guide))
        for name in sorted({*tuned, *base}):
            # Words may have been added to the tuned model's vocabulary, behind the base's.
            if name not in tuned or name not in base or tuned[name][0].shape != base[name][0].shape:
                problem = problem or f"has another {part}.{name}"
            elif not problem and mix:
                base[name].lerp_(tuned[name][: len(base[name])].to(base[name]), mix)
    if problem:
        raise UserError(f"guide {checkpoint}: {problem}: it must be what the model was tuned from")
    return guide


@dataclass(frozen=True)
class Recipe:
    """Everything that a picture is a function of, besides the checkpoint and the prompt.

    `sampler` and `schedule` are names that `find_sampler` knows. `rescale`, `interval` and `apg`
    are what the classes in `ldm/models/diffusion/guidance.py` take. `guide_ckpt` and `guide_mix`
    are for `load_guide`. `weighting` is one of `WEIGHTINGS`, or None for prompts without syntax.
    """

    steps: int = 50
    scale: float = 7.5
    eta: float = 0.0
    sampler: str = "ddim"
    height: int = 512
    width: int = 512
    seed: int = 42
    schedule: str | None = None
    rescale: float = 0.0
    interval: tuple[float, ...] | None = None
    apg: tuple[float, ...] | None = None
    guide_ckpt: str | None = None
    guide_mix: float = 0.0
    weighting: str | None = None
    # Of a photo that is drawn anew: the share of the steps, and the border that is mixed, pixels.
    strength: float | None = None
    mask_blur: int | None = None
    # Of predicted images: a name that `threshold_of` knows, or None for the model's own.
    thresholding: str | None = None

    def __post_init__(self) -> None:
        # Flags and JSON give lists. What is left out of `apg` is written down, so that a picture
        # says all of its recipe.
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))
        if self.apg is not None:
            object.__setattr__(self, "apg", astuple(Projection(*self.apg)))


def has_guide(recipe: Recipe) -> bool:
    """Return whether a recipe names a weaker model, and guides by it."""
    return recipe.guide_ckpt is not None and recipe.scale != 1.0


def guide_of(model: LatentDiffusion, recipe: Recipe) -> LatentDiffusion | None:
    """Return the weaker model that a recipe names, None if it names none or does not guide."""
    # A guide that would have no effect is not even read: it is as large as the model.
    if recipe.guide_ckpt is None or not has_guide(recipe):
        return None
    return load_guide(model, recipe.guide_ckpt, recipe.guide_mix)


def image_seed(seed: int, index: int) -> int:
    """Return the seed of the noise of picture `index` of a series: a function of their sum.

    So picture 3 of seed 42 is picture 0 of seed 45.
    """
    return derive_seed("image", seed + index, 0)


def size_step(model: LatentDiffusion) -> int:
    """Return the number of pixels of which a picture's sides are multiples."""
    unet = model.model.diffusion_model
    # Each downsampling layer of the UNet has a convolution `op` that halves the latent.
    levels = sum(1 for name, _ in unet.named_modules() if name.endswith(".op"))
    return model.downsampling * 2**levels


@contextmanager
def sampling_mode(model: LatentDiffusion, precision: str) -> Iterator[None]:
    """Compute in a precision, with EMA weights, and read each text once for all steps."""
    # A compiled network is one graph, which no step may change.
    unet = model.model.diffusion_model
    is_compiled = isinstance(unet, UNetModel) and unet.is_compiled_for_sampling
    reading = nullcontext() if is_compiled else texts_read_once(model.model)
    with computing_in(model, precision), model.ema_scope("sampling"), reading:
        try:
            yield
        except RuntimeError as error:
            # The first call compiles, which needs a compiler of the machine's.
            if not is_compiled or not type(error).__module__.startswith(("torch._in", "torch._dy")):
                raise
            raise UserError(f"--compile: {first_line(error)}: give --no-compile") from error


def check_size(model: LatentDiffusion, height: int, width: int) -> None:
    """Raise a `UserError` if the UNet cannot halve a latent of this size as often as it does."""
    step = size_step(model)
    if height < step or width < step or height % step or width % step:
        raise UserError(
            f"height {height} and width {width} must be multiples of {step} for this model"
        )


def check_draws(model: LatentDiffusion) -> None:
    """Raise a `UserError` for a model that cannot draw from a text alone."""
    from ldm.models.diffusion.super_resolution import upscales

    # Such a model has no text encoder to ask.
    if model.model.conditioning_key == "concat":
        raise UserError("this model reads no text: it needs an image beside the noise")
    if upscales(model):
        raise UserError(
            "this model enlarges a small picture and draws none of its own: give it after a base "
            "model (scripts/cascade_txt2img.py)"
        )


def text_to_image(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    negative_prompt: str = "",
    precision: str = "full",
    verbose: bool = False,
    may_fail: bool = False,
) -> list[Image.Image]:
    """Return a picture for each prompt: a function of its prompt and its own seed alone.

    Args:
        may_fail: draw black where the model makes values that are no numbers.

    Raises:
        UserError: a size, sampler or number of steps that the model cannot do, or such values.
    """
    from ldm.models.diffusion.inpainting import all_hidden

    check_draws(model)
    return draw_images(
        model,
        prompts,
        seeds,
        recipe,
        # A model that inpaints also reads that the whole image is hidden.
        lambda: all_hidden(model, len(prompts), recipe.height, recipe.width),
        negative_prompt,
        precision,
        verbose,
        may_fail,
    )


@torch.no_grad()
def draw_images(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    beside: Callable[[], Beside | None],
    negative_prompt: str = "",
    precision: str = "full",
    verbose: bool = False,
    may_fail: bool = False,
) -> list[Image.Image]:
    """Return a picture for each prompt, from noise, as `text_to_image` does.

    Args:
        beside: gives what the UNet reads beside the noisy latent and the text.
    """
    from ldm.models.diffusion.sampler_names import make_sampler

    # Refuse what this model cannot do before anything is computed.
    sampler = make_sampler(model, recipe.sampler, recipe.schedule, recipe.thresholding)
    check_size(model, recipe.height, recipe.width)
    height, width = recipe.height // model.downsampling, recipe.width // model.downsampling

    with sampling_mode(model, precision):
        # Read the texts. Guidance also needs what it leads away from, and may need another model.
        guide = guide_of(model, recipe)
        texts = read_prompts(model, prompts, negative_prompt, recipe, guide)
        texts = texts.beside(beside())

        # Go from noise to latents. Each picture draws from its own seed, so the batch that it is
        # in does not matter.
        latents, _ = sampler.sample(
            recipe.steps,
            len(prompts),
            (model.latent_channels, height, width),
            texts.cond,
            eta=recipe.eta,
            verbose=verbose,
            unconditional_guidance_scale=recipe.scale,
            unconditional_conditioning=texts.uncond,
            random=SampleRandom(seeds, model.device),
            guidance=texts.guidance,
        )

        # Decode. Half precision may overflow, which would be drawn as black.
        images = decode(model, latents)
    # A black picture would look like a result, so it is an error unless the caller wants it.
    if not may_fail and not torch.isfinite(images).all():
        raise UserError(
            "the model made values that are no numbers instead of a picture: sample in full "
            "precision, or with other weights"
        )
    return to_pil(images)
