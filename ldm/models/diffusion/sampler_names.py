"""The samplers by the name that scripts and configs use."""

from __future__ import annotations

import re
from typing import Any

from ldm.errors import UserError, nearest
from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solvers import (
    DPM2,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2SAncestral,
    DPMpp3MSDE,
    DPMppSDE,
)
from ldm.models.diffusion.euler import LCM, Euler, EulerAncestral, Heun
from ldm.models.diffusion.multistep import DEIS, LMS, UniPC
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.sigma_sampler import SigmaSampler
from ldm.models.diffusion.sigmas import SCHEDULES
from ldm.models.diffusion.thresholding import threshold_of

# Over time steps of the model's own schedule, as the reference has them.
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "ddpm": DDPMSampler,
}

# Over noise levels; each takes any of the `SCHEDULES`.
SIGMA_SAMPLERS: dict[str, type[SigmaSampler]] = {
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "lms": LMS,
    "dpm_2": DPM2,
    "dpm_2_ancestral": DPM2Ancestral,
    "dpmpp_2s_ancestral": DPMpp2SAncestral,
    "dpmpp_sde": DPMppSDE,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "dpmpp_3m_sde": DPMpp3MSDE,
    "uni_pc": UniPC,
    "deis": DEIS,
    "lcm": LCM,
}

# Names of the same samplers elsewhere, as `_plain` writes them: the web UI's, ComfyUI's,
# k-diffusion's and diffusers'.
ALIASES = {
    "unipc": "uni_pc",
    "pndm": "plms",
    "dpm2": "dpm_2",
    "dpm2_ancestral": "dpm_2_ancestral",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "eulerdiscretescheduler": "euler",
    "eulerancestraldiscretescheduler": "euler_ancestral",
    "heundiscretescheduler": "heun",
    "lmsdiscretescheduler": "lms",
    "kdpm2discretescheduler": "dpm_2",
    "kdpm2ancestraldiscretescheduler": "dpm_2_ancestral",
    "dpmsolvermultistepscheduler": "dpmpp_2m",
    "dpmsolversdescheduler": "dpmpp_sde",
    "unipcmultistepscheduler": "uni_pc",
    "deismultistepscheduler": "deis",
    "lcmscheduler": "lcm",
    "ddimscheduler": "ddim",
    "pndmscheduler": "plms",
    "ddpmscheduler": "ddpm",
}
SCHEDULE_ALIASES = {
    "trailing": "sgm_uniform",
    "uniform": "normal",
    "ays": "align_your_steps",
    "ddim": "ddim_uniform",
}


def find_sampler(name: str, schedule: str | None = None) -> tuple[str, str | None]:
    """Return our names of a sampler and its schedule, of which a name may hold both.

    `DPM++ 2M Karras`, `dpmpp_2m` with `karras` and `DPMSolverMultistepScheduler` are one sampler.

    Returns:
        a key of `SAMPLERS` and None, or a key of `SIGMA_SAMPLERS` and one of `SCHEDULES`.

    Raises:
        UserError: an unknown sampler or schedule, a schedule for a sampler that has its own, or two
            schedules.
    """
    # Web UIs write sampler and schedule as one name.
    sampler = _plain(name)
    for suffix in (*SCHEDULES, *SCHEDULE_ALIASES):
        if sampler.endswith(f"_{suffix}"):
            sampler, within = sampler.removesuffix(f"_{suffix}"), _schedule_name(suffix)
            if schedule is not None and _schedule_name(schedule) != within:
                raise UserError(
                    f"schedule: '{name}' has {within} in its name: leave '{schedule}' out"
                )
            schedule = within
            break
    # What other programs call it is replaced by our own name.
    sampler = ALIASES.get(sampler, sampler)
    if sampler not in SAMPLERS and sampler not in SIGMA_SAMPLERS:
        known = [*SAMPLERS, *SIGMA_SAMPLERS]
        raise UserError(
            f"sampler: unknown '{name}'{nearest(sampler, known)}; accepted: {', '.join(known)}"
        )
    # A schedule for a sampler that has its own would have no effect, so it is refused.
    if sampler in SAMPLERS:
        if schedule is not None:
            raise UserError(f"schedule: {name} has its own time steps: leave '{schedule}' out")
        return sampler, None
    # Without a name: the time steps evenly, as the model was trained.
    wanted = _schedule_name(schedule or "normal")
    if wanted not in SCHEDULES:
        raise UserError(
            f"schedule: unknown '{schedule}'{nearest(wanted, list(SCHEDULES))}; "
            f"accepted: {', '.join(SCHEDULES)}"
        )
    return sampler, wanted


def make_sampler(
    model: Any, name: str, schedule: str | None = None, thresholding: str | None = None
) -> Sampler:
    """Return the sampler of a name, for a model; raise as `find_sampler` and `threshold_of` do.

    Args:
        thresholding: of predicted images; by default the model's own.
    """
    kind, found = find_sampler(name, schedule)
    sampler = SAMPLERS[kind](model) if found is None else SIGMA_SAMPLERS[kind](model, found)
    if thresholding is not None:
        sampler.threshold = threshold_of(thresholding)
    return sampler


def _schedule_name(name: str) -> str:
    """Return our own name of a schedule; a name that is not known stays as it is."""
    plain = _plain(name)
    return SCHEDULE_ALIASES.get(plain, plain)


def _plain(name: str) -> str:
    """Write a name as ComfyUI does: `DPM++ 2S a` becomes `dpmpp_2s_ancestral`."""
    plain = name.strip().lower().replace("++", "pp")
    plain = re.sub(r"[\s-]+", "_", plain)
    # k-diffusion's functions are `sample_euler`, and CompVis's forks call them `k_euler`.
    plain = plain.removeprefix("sample_").removeprefix("k_")
    return re.sub(r"_a(?=_|$)", "_ancestral", plain)
