"""Faults that trainers have had, planted in ours: the suite of the prior loss finds each."""

from dataclasses import replace

import pytest
import torch

from ldm.models.diffusion import ddpm, super_resolution
from ldm.models.diffusion import objective as objectives
from ldm.models.diffusion.objective import Draws, Objective
from ldm.models.diffusion.preservation import OutputPreservation
from ldm.models.diffusion.teacher import AdaptersOff, FrozenCopy
from ldm.modules.losses.batch import Batch
from tests.conformance.adapter import Case
from tests.conformance.test_prior_loss import problems

# Faults, each with a case that shows it. A fault changes the trainer, through `monkeypatch`.

FAULTS = {}


def fault(case: Case):
    def register(plant):
        FAULTS[plant.__name__] = (case, plant)
        return plant

    return register


def changed(patch, owner, name, change):
    """Replace a method by `change(original, *its arguments)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **more: change(original, *args, **more))


@fault(Case())
def detached_prior(patch):
    patch.setattr(Objective, "combine", lambda self, losses: losses[0] + losses[1].detach())


@fault(Case(params={"reg_weight": 0.3}))
def weight_applied_twice(patch):
    patch.setattr(Objective, "combine", lambda s, losses: losses[0] + s.reg_weight**2 * losses[1])


@fault(Case(params={"reg_weight": 0.3}))
def weight_on_the_subject(patch):
    patch.setattr(Objective, "combine", lambda s, losses: s.reg_weight * losses[0] + losses[1])


@fault(Case(params={"reg_weight": 0.3}))
def weight_ignored(patch):
    patch.setattr(Objective, "combine", lambda self, losses: losses[0] + losses[1])


@fault(Case())
def half_of_the_sum(patch):
    patch.setattr(Objective, "combine", lambda self, losses: (losses[0] + losses[1]) / 2)


@fault(Case())
def gradients_that_are_no_numbers(patch):
    """The loss is right; a root of 0, added to it, has an infinite slope."""
    total = lambda self, losses: sum(losses) + (0 * losses[0]).sqrt()  # noqa: E731
    patch.setattr(Objective, "combine", total)


@fault(Case())
def class_prompt_ignored(patch):
    patch.setattr(Objective, "captions", lambda self, batch: list(batch.subject.captions) * 2)


@fault(Case())
def class_prompt_empty(patch):
    patch.setattr(Objective, "captions", lambda self, batch: [*batch.subject.captions, "", ""])


@fault(Case())
def pairs_out_of_order(patch):
    patch.setattr(Objective, "captions", lambda self, batch: batch.captions[::-1])


@fault(Case())
def captions_out_of_order_within_the_prior(patch):
    change = lambda self, batch: [*batch.captions[:2], *batch.captions[:1:-1]]  # noqa: E731
    patch.setattr(Objective, "captions", change)


@fault(Case(sizes=(1, 3)))
def one_mean_over_both_parts(patch):
    def total(original, self, batch, losses):
        _, logged = original(self, batch, losses)
        return (1 + self.reg_weight) * losses["loss"].mean(), logged

    changed(patch, Objective, "total", total)


@fault(Case(masks=True))
def mean_over_the_wrong_axis(patch):
    def per_sample(output, target, loss_type="l2", weights=None):
        # Weights of places that are averaged over the batch, too.
        error = (output - target) ** 2
        weights = torch.ones_like(error[:, 0]) if weights is None else weights
        return (error * weights[:, None]).mean((1, 2, 3)) / weights.mean()

    patch.setattr(objectives, "per_sample_loss", per_sample)


@fault(Case(masks=True))
def prior_counted_with_the_subjects_mask(patch):
    def places(original, self, batch, latents):
        found = original(self, batch, latents)
        return torch.cat([found[:2], found[:2]])

    changed(patch, Objective, "place_weights", places)


@fault(Case(params={"min_snr_gamma": 5.0}))
def weights_of_time_steps_not_chunked(patch):
    def losses(original, self, schedule, vlb, output, x, t, noise, *more):
        # All are weighed by the subject's time steps.
        found = original(self, schedule, vlb, output, x, t, noise, *more)
        first = torch.cat([t[:2], t[:2]])
        weight = self.prediction.min_snr_weight
        gamma = self.min_snr_gamma
        found["loss"] = found["loss_simple"] * weight(schedule, first, gamma)
        return found

    changed(patch, Objective, "losses", losses)


@fault(Case())
def noise_compared_with_anothers(patch):
    def losses(original, self, schedule, vlb, output, x, t, noise, *more):
        return original(self, schedule, vlb, output, x, t, noise.flip(0), *more)

    changed(patch, Objective, "losses", losses)


def with_draws(patch, change):
    changed(patch, Objective, "draws", lambda original, *args: change(original(*args)))


@fault(Case())
def prior_at_the_subjects_time_steps(patch):
    with_draws(patch, lambda d: Draws(d.eps, torch.cat([d.t[:2], d.t[:2]]), d.noise))


@fault(Case())
def prior_with_the_subjects_noise(patch):
    with_draws(patch, lambda d: Draws(d.eps, d.t, torch.cat([d.noise[:2], d.noise[:2]])))


@fault(Case(params={"noisy_step_weight": 0.2}))
def prior_weighed_by_its_time_step_as_the_subject(patch):
    weights = lambda s, b, t, n: 1 - (1 - s.noisy_step_weight) * t / (n - 1)  # noqa: E731
    patch.setattr(Objective, "step_weights", weights)


def with_twice_the_loss(patch):
    def total(original, self, batch, losses):
        loss, logged = original(self, batch, losses)
        return 2 * loss, logged

    changed(patch, Objective, "total", total)


@fault(Case(accumulated=2))
def accumulated_gradients_summed(patch):
    with_twice_the_loss(patch)


@fault(Case(processes=2))
def processes_that_learn_alone(patch):
    """Their gradients are not shared."""
    parallel = torch.nn.parallel.DistributedDataParallel
    changed(patch, parallel, "forward", lambda _, self, *args, **more: self.module(*args, **more))


@fault(Case(processes=2))
def gradients_of_processes_summed(patch):
    with_twice_the_loss(patch)


@fault(Case("v1-inpainting"))
def prior_hidden_by_the_subjects_masks(patch):
    def channels(original, model, masks, batch):
        prior = replace(batch.prior, seeds=batch.subject.seeds)
        return original(model, masks, Batch(batch.subject, prior))

    changed(patch, ddpm, "training_channels", channels)


@fault(Case("enlarging"))
def small_pictures_told_anothers_noise(patch):
    def read(original, model, low_scale, pictures, factor, levels, noise):
        found = original(model, low_scale, pictures, factor, levels, noise)
        return {**found, "c_adm": levels.flip(0)}

    changed(patch, super_resolution, "read_small", read)


@fault(Case(method="prior_prediction"))
def teacher_that_learns(patch):
    def predict(self, model, captions, x_noisy, t):
        with torch.no_grad():
            return model.apply_model(x_noisy, t, model.get_learned_conditioning(captions))

    patch.setattr(FrozenCopy, "predict", predict)


@fault(Case(method="dop", lora=True))
def teacher_with_its_adapters_on(patch):
    def predict(self, model, captions, x_noisy, t):
        with torch.no_grad():
            return model.apply_model(x_noisy, t, model.get_learned_conditioning(captions))

    patch.setattr(AdaptersOff, "predict", predict)


@fault(Case(method="dop"))
def teacher_read_with_the_subjects_caption(patch):
    def predict(original, self, model, captions, *more):
        return original(self, model, [f"photo of a sks dog {n}" for n in (0, 1)], *more)

    changed(patch, FrozenCopy, "predict", predict)


@fault(Case(method="dop"))
def identifier_kept_in_the_class_prompt(patch):
    patch.setattr(OutputPreservation, "captions", lambda self, batch: list(batch.subject.captions))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, monkeypatch):
    case, plant = FAULTS[name]
    plant(monkeypatch)
    assert problems(case) != []
