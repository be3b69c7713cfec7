"""The samplers by the name that scripts and configs use."""

from __future__ import annotations

from ldm.models.diffusion.ancestral import DDPMSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler

# A closed set: a new sampler is one class with a `step`, and one line here.
SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "ddpm": DDPMSampler}
