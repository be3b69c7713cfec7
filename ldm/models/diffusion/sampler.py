"""The one sampling loop. A sampler is a choice of time steps and an update from x_t to x_{t-1}."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.models.diffusion import conditioning as conditions
from ldm.models.diffusion.conditioning import Cond
from ldm.models.diffusion.guidance import Denoiser, guided
from ldm.rng import SampleRandom


def uniform_timesteps(steps: int, total: int) -> Tensor:
    """`steps` evenly spaced time steps of `total`, ascending, int64 (DDIM, appendix D.3).

    They start at 1, as Stable Diffusion's do (10 of 1000: 1, 101, ..., 901), or at 0 when all are visited.
    """
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be between 1 and {total}, got {steps}")
    offset = 1 if steps < total else 0
    return torch.arange(steps) * total // steps + offset


def trailing_timesteps(steps: int, total: int) -> Tensor:
    """`steps` evenly spaced time steps that end with the last one, ascending (Lin et al., 2305.08891, table 2).

    Where the last step is noise alone, sampling has to start there, as training did.
    """
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be between 1 and {total}, got {steps}")
    return (torch.arange(1, steps + 1, dtype=torch.float64) * total / steps).round().long() - 1


class Sampler(ABC):
    """Draws latents from a `LatentDiffusion`.

    A subclass gives `step`, and `timesteps` if it does not want evenly spaced ones.

    Args:
        model: offers `apply_model`, `schedule` and `parameterization`.
        schedule: accepted for older scripts, without effect.
    """

    supports_eta = True

    def __init__(self, model: Any, schedule: str = "linear"):
        self.model = model
        self.schedule = model.schedule

    def timesteps(self, steps: int) -> Tensor:
        """The time steps to visit, ascending, (steps,)."""
        spaced = trailing_timesteps if self.schedule.ends_in_noise else uniform_timesteps
        return spaced(steps, len(self.schedule))

    @abstractmethod
    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """x at the time step before the `index`-th visited one, and the clean latent that x predicts.

        `denoise(x, t)` is the (guided) model output; `noise()` a fresh draw of x's shape, already scaled
        by the temperature.
        """

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Fix the visited time steps and the quantities there; `sample` does it itself.

        Sets `ddim_timesteps`, `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas` and
        `ddim_sqrt_one_minus_alphas`, each (ddim_num_steps,), ascending in time.
        """
        if ddim_discretize != "uniform":
            raise UserError(f"ddim_discretize: unknown '{ddim_discretize}'; accepted: uniform")
        if ddim_eta and not self.supports_eta:
            raise UserError(f"{type(self).__name__} is deterministic: eta must be 0, got {ddim_eta}")
        self.schedule = self.model.schedule
        acp = self.schedule.alphas_cumprod
        self.ddim_timesteps = self.timesteps(ddim_num_steps).to(acp.device)
        self.ddim_alphas = acp[self.ddim_timesteps]
        self.ddim_alphas_prev = torch.cat([acp[:1], self.ddim_alphas[:-1]])
        # DDIM, eq. 16; float64, because 1 - a_t / a_prev cancels; on the CPU, because MPS has none.
        a, a_prev = self.ddim_alphas.cpu().double(), self.ddim_alphas_prev.cpu().double()
        sigmas = ddim_eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        self.ddim_sigmas = sigmas.to(acp)
        self.ddim_sqrt_one_minus_alphas = (1 - self.ddim_alphas).sqrt()

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Cond,
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
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Latents after `S` steps from pure noise, (batch_size, *shape), and `x_inter` / `pred_x0` on the way.

        Args:
            shape: (channels, height, width) of a latent.
            conditioning: of `batch_size` samples; `unconditional_conditioning` likewise, for guidance.
            callback: gets the number of the step; `img_callback` also the predicted clean latent.
            eta: 0 deterministic, 1 as random as DDPM (DDIM, eq. 16).
            mask: where it is 1 (or between), the result follows `x0`; broadcasts to a latent.
            temperature: scales the noise of each step.
            x_T: the noise to start from.
            log_every_t: every how many steps the intermediates are kept.
            random: where noise comes from; torch's global generator when None.

        Raises:
            UserError: more steps than the schedule has, or an eta that the sampler does not know.
            ValueError: a conditioning of another batch size, or a mask without `x0`.
        """
        for cond in (conditioning, unconditional_conditioning):
            if cond is not None and conditions.batch_size(cond) != batch_size:
                raise ValueError(f"conditioning for {conditions.batch_size(cond)} samples, batch_size is {batch_size}")
        if (mask is None) != (x0 is None):
            raise ValueError("mask and x0 belong together: give both or neither")
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        device = self.schedule.betas.device
        random = random or SampleRandom(device=device)
        x = random.randn((batch_size, *shape)) if x_T is None else x_T.to(device)
        return self._run(
            x,
            S,
            guided(self.model.apply_model, conditioning, unconditional_conditioning, unconditional_guidance_scale),
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
        """The last `steps` of the visited time steps, from the noisiest to the cleanest."""
        self.reset()
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        order = tqdm(range(steps)[::-1], desc=type(self).__name__, disable=not verbose, leave=False)
        for number, index in enumerate(order):
            if mask is not None and x0 is not None:
                t = self._batch_of(index, x)
                x = mask * self.schedule.q_sample(x0, t, random.randn(x.shape)) + (1 - mask) * x
            x, pred_x0 = self.step(x, index, denoise, lambda: temperature * random.randn(x.shape))  # noqa: B023
            if callback:
                callback(number)
            if img_callback:
                img_callback(pred_x0, number)
            if index % log_every_t == 0 or number == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def reset(self) -> None:
        """Called before the first step of a run, for samplers that remember earlier ones."""

    def _batch_of(self, index: int, x: Tensor) -> Tensor:
        """The `index`-th visited time step for each sample of x."""
        return self.ddim_timesteps[index].expand(len(x))

    def _predictions(self, x: Tensor, index: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and clean latent that a model output at the `index`-th visited time step stands for."""
        t = self._batch_of(index, x)
        parameterization = self.model.parameterization
        return (
            parameterization.to_noise(self.schedule, x, t, output),
            parameterization.to_start(self.schedule, x, t, output),
        )

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 with the noise of the `t`-th visited time step (of the schedule's, with `use_original_steps`)."""
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
    ) -> Tensor:
        """The clean latent from one that has the noise of visited time step `t_start - 1`.

        Call `make_schedule` first.
        """
        denoise = guided(self.model.apply_model, cond, unconditional_conditioning, unconditional_guidance_scale)
        random = random or SampleRandom(device=x_latent.device)
        return self._run(x_latent, t_start, denoise, random, verbose=verbose)[0]

    def _ddim_update(self, index: int, eps: Tensor, pred_x0: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the time step before, from its predicted noise and clean latent (DDIM, eq. 12)."""
        a_prev, sigma = self.ddim_alphas_prev[index], self.ddim_sigmas[index]
        # From noise alone with eta 1 the bracket is 0, but for rounding.
        x_prev = a_prev.sqrt() * pred_x0 + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * eps
        return x_prev + sigma * noise() if sigma > 0 else x_prev
