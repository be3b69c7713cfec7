"""The loss with its prior term, its gradients and the captions that are read, against a reference.

The suite stands alone: it knows nothing of this project but `adapter.py` beside it, which connects a
trainer. To test another trainer, write that file for it. The reference is the equations in float64.
That the suite finds faults is tested in `test_planted_faults.py`, which plants them in our trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.conformance.adapter import Adapter, Case, Found, Part

EXACT = 1e-6
TAUGHT = ("prior_prediction", "dop", "blank")

# The reference


def terms(method: str, batch: Sequence[Part]) -> list[tuple[Part, list[str], bool]]:
    """Return the parts of a batch's loss: examples, their captions, whether the mask counts."""
    subject, *prior = batch
    found = [(subject, subject.captions, True)]
    if method in ("class_images", "prior_prediction"):
        found += [(part, part.captions, True) for part in prior]
    elif method in ("dop", "blank"):
        empty = [""] * len(subject.captions)
        found += [(subject, subject.class_captions if method == "dop" else empty, False)]
    return found


def linear_betas() -> Tensor:
    """Return Stable Diffusion's betas, whose roots are evenly spaced."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


def cosine_betas() -> Tensor:
    """Return the betas of Nichol & Dhariwal, eq. 17."""
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    signal = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


def reference(case: Case, adapter: Adapter, batch: Sequence[Part]) -> Tensor:
    """Return subject + reg_weight x prior (DreamBooth, eq. 2), in float64."""
    given = case.params.get
    in_pixels = case.family in ("pixels", "enlarging")
    betas = cosine_betas() if in_pixels else linear_betas()
    alphas = torch.cumprod(1 - betas, 0)
    kind = given("parameterization", "v" if in_pixels or "-v" in case.family else "eps")
    losses = []
    for number, (part, captions, masked) in enumerate(terms(case.method, batch)):
        x, t, noise = adapter.draws(part)
        a = alphas[t]
        root, rest = (value.sqrt()[:, None, None, None] for value in (a, 1 - a))
        x_t = root * x + rest * noise
        target = {"eps": noise, "x0": x, "v": root * noise - rest * x}[kind]
        if number and case.method in TAUGHT:
            target = adapter.predict_before(part, x_t, t, captions)
        error = adapter.predict(part, x_t, t, captions) - target
        error = error.abs() if given("loss_type") == "l1" else error**2
        places = part.masks[:, None].double() if masked and part.masks is not None else 1.0
        places = places * torch.ones_like(error)
        each = (error * places).sum((1, 2, 3)) / places.sum((1, 2, 3))
        snr, factor = a / (1 - a), torch.ones(len(t), dtype=torch.float64)
        if gamma := given("min_snr_gamma"):
            factor = (
                snr.clamp(max=gamma) / {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[kind]
            )
        if number == 0:
            factor = factor * (1 - (1 - given("noisy_step_weight", 1.0)) * t / 999)
        loss = factor * each
        if elbo := given("original_elbo_weight"):
            before = torch.cat([torch.ones(1).double(), alphas[:-1]])
            variance = betas * (1 - before) / (1 - alphas)
            bound = betas**2 / (2 * variance * (1 - betas) * (1 - alphas))  # DDPM, eq. 12
            bound[0] = bound[1]
            loss = loss + elbo * bound[t] * each
        losses.append(loss.mean())
    subject, *prior = losses
    return subject + given("reg_weight", 1.0) * prior[0] if prior else subject


# The comparison


def part(
    first: int, count: int, word: str, masks: bool, named: bool, shape: tuple[int, int, int]
) -> Part:
    seeds = list(range(first, first + count))
    noise = torch.Generator().manual_seed(first)
    latents = torch.randn((count, *shape), generator=noise).double()
    drawn = torch.rand((count, *shape[1:]), generator=noise).double() if masks else None
    captions = [f"photo of a {word} {seed}" for seed in seeds]
    classes = [caption.replace("sks ", "") for caption in captions] if named else None
    return Part(latents, captions, seeds, classes, drawn)


def batches_of(case: Case, shape: tuple[int, int, int]) -> list[list[Part]]:
    """Return the batches of a step, of examples of a shape (c, h, w)."""
    found = []
    for number in range(case.accumulated * case.processes):
        batch = [part(10 * number, case.sizes[0], "sks dog", case.masks, True, shape)]
        if case.method in ("class_images", "prior_prediction"):
            batch.append(part(500 + 10 * number, case.sizes[1], "cat", False, False, shape))
        found.append(batch)
    return found


def problems(case: Case, tolerance: float = EXACT) -> list[str]:
    """Return in what a trainer's step differs from the reference; nothing if it conforms."""
    adapter = Adapter(case)
    batches = batches_of(case, adapter.shape)
    loss = sum(reference(case, adapter, batch) for batch in batches) / len(batches)
    named = adapter.parameters()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    expected = {n: g for n, g in zip(named, gradients) if g is not None}
    found: Found = adapter.step(batches)
    wrong = [] if abs(found.loss - loss.item()) <= tolerance * loss.item() else ["loss"]
    if not found.is_shared:
        wrong.append("processes end with other gradients")
    if found.gradients.keys() != expected.keys():
        wrong.append("which tensors have gradients")
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in found.gradients.keys() & expected.keys():
        difference = (found.gradients[name] - expected[name]).abs().max()
        if not difference <= tolerance * scale:  # what is no number differs, too
            wrong.append(f"gradient of {name}")
    read = {
        text for batch in batches for _, texts, _ in terms(case.method, batch) for text in texts
    }
    if {text for texts in found.captions for text in texts} != read:
        wrong.append("captions")
    return wrong


CASES = {
    "plain": Case(),
    "weight": Case(params={"reg_weight": 0.3}),
    "unequal": Case(sizes=(1, 3)),
    "accumulated": Case(accumulated=3),
    "two-processes": Case(processes=2, sizes=(1, 2)),
    "two-processes-lora": Case(processes=2, lora=True, accumulated=2, params={"reg_weight": 0.3}),
    "two-processes-words": Case(processes=2, method="none", words=2, masks=True),
    "two-processes-dop": Case(processes=2, method="dop", masks=True),
    "masks": Case(masks=True),
    "l1": Case(params={"loss_type": "l1"}),
    "min-snr": Case(params={"min_snr_gamma": 5.0}),
    "elbo": Case(params={"original_elbo_weight": 0.5}),
    "noisy-steps": Case(params={"noisy_step_weight": 0.2}),
    "offset-noise": Case(params={"offset_noise": 0.1}),
    "x0": Case(params={"parameterization": "x0"}),
    "lora": Case(lora=True),
    "words": Case(method="none", words=2),
    "v2-words": Case("v2-v", method="none", words=1, accumulated=2, masks=True),
    "v2": Case("v2"),
    "v2-v-lora-min-snr": Case("v2-v", lora=True, params={"min_snr_gamma": 5.0}),
    # With more than a text beside the noisy latent, and in pixels.
    "inpainting": Case("v1-inpainting", accumulated=2, sizes=(1, 2), params={"reg_weight": 0.3}),
    "inpainting-lora": Case("v1-inpainting", processes=2, lora=True),
    "inpainting-words": Case("v1-inpainting", method="none", words=2),
    "pixels": Case("pixels", sizes=(2, 1), params={"min_snr_gamma": 5.0}),
    "pixels-dop": Case("pixels", method="dop", processes=2, masks=True),
    "pixels-lora": Case("pixels", lora=True, accumulated=2, params={"noisy_step_weight": 0.2}),
    "enlarging": Case("enlarging", processes=2, sizes=(1, 2), masks=True),
    "enlarging-lora": Case("enlarging", lora=True, params={"offset_noise": 0.1}),
    "none": Case(method="none"),
    "prior_prediction": Case(method="prior_prediction", sizes=(1, 2), masks=True),
    "dop": Case(method="dop", masks=True, params={"reg_weight": 0.3}),
    "blank": Case("v2-v", method="blank", accumulated=2),
    "dop-lora": Case(method="dop", lora=True, params={"min_snr_gamma": 5.0}),
    "prior_prediction-lora": Case(method="prior_prediction", lora=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_reference(name):
    assert problems(CASES[name]) == []


@pytest.mark.parametrize("precision, tolerance", [("32-true", 2e-5), ("bf16-mixed", 0.1)])
def test_a_step_is_the_reference_as_far_as_a_precision_goes(precision, tolerance):
    """float32 rounds to 6e-8 and bfloat16 to 4e-3, and a network adds that up."""
    assert problems(Case(precision=precision), tolerance) == []
