"""The one sampling loop. A sampler is a choice of time steps and an update from x_t to x_{t-1}."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.models.diffusion import conditioning as conditions
from ldm.models.diffusion.conditioning import Cond
from ldm.models.diffusion.guidance import Denoiser, Guidance, SampledModel, guided
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.thresholding import Threshold
from ldm.modules.diffusionmodules.util import (
    check_steps,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)
from ldm.rng import SampleRandom

# Gives a fresh draw of a latent's shape.
Noise = Callable[[], Tensor]


def uniform_timesteps(steps: int, total: int) -> Tensor:
    """Return evenly spaced time steps, ascending, int64, see `make_ddim_timesteps`."""
    return torch.from_numpy(make_ddim_timesteps("uniform", steps, total))


def trailing_timesteps(steps: int, total: int) -> Tensor:
    """Return `steps` evenly spaced time steps that end with the last one, ascending.

    Where the last step is noise alone, sampling has to start there, as training did (Lin et al.,
    2305.08891, table 2).
    """
    check_steps(steps, total)
    ends = torch.arange(1, steps + 1, dtype=torch.float64) * total / steps
    return ends.round().long() - 1


class Sampler(ABC):
    """Draws latents from a `LatentDiffusion`: the loop, of which a subclass gives the update.

    A subclass gives `step`, and `timesteps` if it does not want evenly spaced ones.

    Args:
        schedule: accepted for older scripts, without effect.
    """

    supports_eta = True

    def __init__(self, model: SampledModel, schedule: str = "linear"):
        self.model = model
        self.schedule = model.schedule
        # What is done to each predicted clean latent: the model's way, unless a caller changes it.
        self.threshold: Threshold | None = model.threshold

    def timesteps(self, steps: int) -> Tensor:
        """Return the time steps to visit, ascending, (steps,)."""
        # With zero terminal SNR, training reaches the last step, so sampling starts there (Lin et
        # al., section 3.3). Stable Diffusion's own steps start earlier.
        if self.schedule.ends_in_noise:
            return trailing_timesteps(steps, len(self.schedule))
        return uniform_timesteps(steps, len(self.schedule))

    @abstractmethod
    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Noise) -> tuple[Tensor, Tensor]:
        """Return x after a step, and the x_0 that was predicted in it.

        Args:
            index: how many steps are left after this one; the number of the visited time step.
            denoise: gives the (guided) model output for x and time steps.
            noise: gives a fresh draw of x's shape, already scaled by the temperature.
        """

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the visited time steps and compute what holds there; `sample` does it itself.

        Sets `ddim_timesteps`, `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas` and
        `ddim_sqrt_one_minus_alphas`, each (ddim_num_steps,), ascending in time.
        """
        # LDM's arguments are accepted, but not a value that asks for what this sampler cannot do.
        if ddim_discretize != "uniform":
            raise UserError(f"ddim_discretize: unknown '{ddim_discretize}'; accepted: uniform")
        if ddim_eta and not self.supports_eta:
            name = type(self).__name__
            raise UserError(f"{name} is deterministic: eta must be 0, got {ddim_eta}")
        # The model's schedule as it is now: a checkpoint may have brought another.
        self.schedule = self.model.schedule
        acp = self.schedule.alphas_cumprod
        # The visited steps are a subsequence of the schedule's (DDIM, section 4.2).
        self.ddim_timesteps = self.timesteps(ddim_num_steps).to(acp.device)
        self.ddim_alphas = acp[self.ddim_timesteps]
        # The last step ends at the schedule's first, with the little noise that is left there.
        self.ddim_alphas_prev = torch.cat([acp[:1], self.ddim_alphas[:-1]])
        # Sigma (DDIM, eq. 16) in float64, because 1 - a_t / a_prev cancels; on the CPU, because MPS
        # has no float64.
        exact, visited = acp.cpu().double().numpy(), self.ddim_timesteps.cpu().numpy()
        sigmas, _, _ = make_ddim_sampling_parameters(exact, visited, ddim_eta)
        self.ddim_sigmas = torch.from_numpy(sigmas).to(acp)
        # Not read here, but by scripts of the LDM family.
        self.ddim_sqrt_one_minus_alphas = (1 - self.ddim_alphas).sqrt()

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Cond | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Cond | None = None,
        random: SampleRandom | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return latents after `S` steps from pure noise, and `x_inter` / `pred_x0` on the way.

        Args:
            shape: (channels, height, width) of a latent.
            conditioning, unconditional_conditioning: of `batch_size` samples; the second for
            guidance.
            callback: gets the number of the step; `img_callback` also the predicted clean latent.
            eta: 0 deterministic, 1 as random as DDPM (DDIM, eq. 16).
            mask: where it is 1 (or between), the result follows `x0`; broadcasts to a latent.
            temperature: scales the noise of each step.
            x_T: the noise to start from.
            log_every_t: every how many steps the intermediates are kept.
            random: where noise comes from; torch's global generator when None.
            guidance: what changes classifier-free guidance.

        Raises:
            UserError: more steps than the schedule has, or an eta that the sampler does not know.
            ValueError: a conditioning of another batch size, or a mask without `x0`.
        """
        # A conditioning of another size would be broadcast, or fail deep inside the UNet.
        for cond in (conditioning, unconditional_conditioning):
            found = conditions.batch_size(cond)
            if found not in (None, batch_size):
                message = f"conditioning for {found} samples, batch_size is {batch_size}"
                raise ValueError(message)
        if (mask is None) != (x0 is None):
            raise ValueError("mask and x0 belong together: give both or neither")

        # Choose the time steps, and compute how much signal and noise there is at each.
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)

        # Start from noise, which is what x_T is close to (DDPM, algorithm 2, line 1). It is the
        # first draw: the order of draws is part of what a seed means.
        device = self.schedule.betas.device
        random = random or SampleRandom(device=device)
        x = random.randn((batch_size, *shape)) if x_T is None else x_T.to(device)

        # Guide the model towards the prompt. The loop sees one model and one output.
        scale = unconditional_guidance_scale
        denoise = guided(self.model, conditioning, unconditional_conditioning, scale, guidance)
        return self._run(
            x,
            S,
            denoise,
            random,
            mask=mask,
            x0=x0,
            temperature=temperature,
            verbose=verbose,
            log_every_t=log_every_t,
            callback=callback,
            img_callback=img_callback,
        )

    def _run(
        self,
        x: Tensor,
        steps: int,
        denoise: Denoiser,
        random: SampleRandom,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        verbose: bool = True,
        log_every_t: int = 100,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run through the `steps` cleanest of the chosen steps, from the noisiest to the cleanest.

        This is the loop of every sampler. Its steps are counted down, so that the last one is 0.
        """
        # One object may sample many times. Nothing of an earlier run may reach this one.
        self.reset()

        # From here on x is what the steps work on: x_t itself, or x_t on another scale.
        x = self._scaled(x, steps)
        # Both lists begin with the noise itself, as LDM's do.
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        indices, shape = range(steps)[::-1], x.shape

        def draw() -> Tensor:
            return temperature * random.randn(shape)

        name = type(self).__name__
        for number, index in enumerate(tqdm(indices, desc=name, disable=not verbose, leave=False)):
            # Inpainting: put x0 with this step's noise where the mask is 1, so that the model fills
            # in the rest to fit it.
            if mask is not None and x0 is not None:
                known = self._noised(x0, index, random.randn(shape))
                x = mask * known + (1 - mask) * x

            # One update, which is all that samplers differ in.
            x, pred_x0 = self.step(x, index, denoise, draw)

            # Callbacks get the predicted x_0, in which a picture shows long before it does in x_t.
            # Only the noisiest step and every `log_every_t`-th one are kept, to save memory.
            if callback:
                callback(number)
            if img_callback:
                img_callback(pred_x0, number)
            if index % log_every_t == 0 or number == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def reset(self) -> None:
        """Forget the steps of an earlier run, in samplers that remember some."""

    def _scaled(self, x: Tensor, steps: int) -> Tensor:
        """Return x_t on the scale of the steps, of which `steps` are left."""
        return x

    def _noised(self, x0: Tensor, index: int, noise: Tensor) -> Tensor:
        """Return x0 with as much noise as x has before the `index`-th step (DDPM, eq. 4)."""
        return self.schedule.q_sample(x0, self._batch_of(index, noise), noise)

    def _batch_of(self, index: int, x: Tensor) -> Tensor:
        """Return the `index`-th visited time step for each sample of x."""
        return self.ddim_timesteps[index].expand(len(x))

    def _predictions(self, x: Tensor, index: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise and clean latent of an output at the `index`-th visited time step."""
        # Updates are written in noise and x_0, so that each sampler serves every parameterization.
        t = self._batch_of(index, x)
        prediction = PARAMETERIZATIONS[self.model.parameterization]
        start = prediction.to_start(self.schedule, x, t, output)
        if self.threshold is None:
            return prediction.to_noise(self.schedule, x, t, output), start
        # Noise and x_0 have to be of one x_t, so the noise follows from the thresholded x_0.
        start = self.threshold(start)
        return self.schedule.noise_from_start(x, t, start), start

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Return x0 with the noise of the `t`-th visited time step.

        Args:
            use_original_steps: `t` counts all of the schedule's time steps.
        """
        # Image to image, first part (SDEdit, Meng et al., 2108.01073): noise hides the details of
        # an image and leaves its coarse layout. A larger `t` leaves less of it.
        noise = torch.randn_like(x0) if noise is None else noise
        steps = t if use_original_steps else self.ddim_timesteps[t]
        return self.schedule.q_sample(x0, steps, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Cond,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Cond | None = None,
        random: SampleRandom | None = None,
        verbose: bool = True,
        guidance: Guidance | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> Tensor:
        """Return the clean latent from one that has the noise of visited time step `t_start - 1`.

        Call `make_schedule` first.

        Args:
            mask, x0: as of `sample`.
        """
        # Image to image, second part: the usual loop, started in the middle, draws new details that
        # fit the text.
        scale = unconditional_guidance_scale
        denoise = guided(self.model, cond, unconditional_conditioning, scale, guidance)
        random = random or SampleRandom(device=x_latent.device)
        return self._run(x_latent, t_start, denoise, random, mask, x0, verbose=verbose)[0]

    def _ddim_update(self, index: int, eps: Tensor, pred_x0: Tensor, noise: Noise) -> Tensor:
        """Return x at the time step before, from its predicted noise and x_0 (DDIM, eq. 12)."""
        a_prev, sigma = self.ddim_alphas_prev[index], self.ddim_sigmas[index]
        # Noise has the variance 1 - a_prev here. Sigma squared of it is drawn anew; the rest keeps
        # the predicted noise. From pure noise with eta 1 the rest is 0, and may be below by
        # rounding.
        kept = (1 - a_prev - sigma**2).clamp(min=0).sqrt()
        # The predicted x_0, the direction that points to x_t, and random noise: the three terms of
        # eq. 12.
        x_prev = a_prev.sqrt() * pred_x0 + kept * eps
        return x_prev + sigma * noise() if sigma > 0 else x_prev
