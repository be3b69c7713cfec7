"""Measure samplers and guidance on the miniature, for the tables of `docs/sampling.md`.

    python scripts/tiny/sampling.py samplers
    python scripts/tiny/sampling.py guidance --tuned dog=logs/.../last.ckpt robot=logs/.../last.ckpt

What was measured is kept in `--outdir` and not measured again, so the command can be stopped and
started again. The tables are printed. `samplers` needs nothing but the weights that ship.
`guidance` needs what `scripts/tiny/evaluate.py` needs, and checkpoints of tuned miniatures, which
`scripts/demo.py` makes.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.commands import exit_status
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import UserError, check_once
from ldm.evaluation.intervals import Estimate, estimate
from ldm.evaluation.metrics import features_of, middle, to_tensor
from ldm.models.diffusion.sampler_names import make_sampler
from ldm.rng import SampleRandom
from ldm.sampling.text_to_image import Recipe, image_seed, load_model, text_to_image
from ldm.tiny.measure import SIZE, Judges, subject_prompts
from ldm.tiny.miniature import CLIP_IMAGES, RECIPE, WEIGHTS, class_word_of, photos_of
from ldm.tiny.world import SPRITES

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where `scripts` is
from scripts.tiny.evaluate import make_judges, remembered, results_folder, worlds

# Samplers that solve the same equation: from the same noise they all go to the same picture.
SAMPLERS = (
    *("ddim", "plms", "euler normal", "euler karras", "heun karras", "lms karras"),
    *("dpm_2 karras", "dpmpp_2m normal", "dpmpp_2m karras", "uni_pc karras", "deis karras"),
)
REFERENCE, REFERENCE_STEPS = "dpmpp_2m karras", 1000
STEPS = (10, 20, 50, 5, 100)  # what matters most comes first
PROMPTS = (
    "a photo of a dog in the snow",
    "a photo of a teapot on the beach",
    "a photo of a robot at night",
    "a photo of a red car in the jungle",
)

# What changes guidance, beside the scale that they have in common.
GUIDANCE: dict[str, dict[str, Any]] = {
    "none (scale 1)": {"scale": 1.0},
    "classifier-free": {},
    "interval 0.28 to 5.42": {"interval": (0.28, 5.42)},
    "base model": {"guide_ckpt": str(WEIGHTS)},
    "base model, half mixed": {"guide_ckpt": str(WEIGHTS), "guide_mix": 0.5},
    "APG 0 2.5 -0.5": {"apg": (0.0, 2.5, -0.5)},
    "rescale 0.7": {"rescale": 0.7},
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("samplers", "guidance"))
    parser.add_argument("--tuned", nargs="+", metavar="SUBJECT=CKPT", default=[])
    parser.add_argument("--sprites", type=Path, default=SPRITES, help="default: %(default)s")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/sampling"))
    return parser


# Samplers


@torch.no_grad()
def latents_of(model: Any, name: str, steps: int) -> Tensor:
    """Return the latents of the prompts, from the same noise for every sampler."""
    sampler, _, schedule = name.partition(" ")
    cond = model.get_learned_conditioning(PROMPTS)
    uncond = model.get_learned_conditioning([""] * len(PROMPTS))
    side = RECIPE.height // model.downsampling
    seeds = [image_seed(RECIPE.seed, number) for number in range(len(PROMPTS))]
    found, _ = make_sampler(model, sampler, schedule or None).sample(
        steps,
        len(PROMPTS),
        (model.latent_channels, side, side),
        cond,
        verbose=False,
        unconditional_guidance_scale=RECIPE.scale,
        unconditional_conditioning=uncond,
        random=SampleRandom(seeds),
    )
    return found


def measure_samplers(args: argparse.Namespace) -> None:
    """Print how far each sampler's latents are from the reference's, in standard deviations."""
    model = load_model(WEIGHTS)
    outdir = results_folder(args.outdir, WEIGHTS)
    path = outdir / "reference.json"
    values = remembered(
        path, lambda: {"latents": latents_of(model, REFERENCE, REFERENCE_STEPS).tolist()}
    )
    reference = torch.tensor(values["latents"])

    def distance(name: str, steps: int) -> dict[str, Any]:
        difference = latents_of(model, name, steps) - reference
        each = difference.square().mean((1, 2, 3)).sqrt() / reference.std((1, 2, 3))
        return {"distance": each.tolist()}

    found: dict[tuple[str, int], float] = {}
    for steps, name in itertools.product(STEPS, SAMPLERS):
        path = outdir / f"{name.replace(' ', '-')}-{steps}.json"
        each = remembered(path, lambda: distance(name, steps))["distance"]  # noqa: B023 - called now
        found[name, steps] = sum(each) / len(each)
        print(f"{name} {steps}: {found[name, steps]:.3f}", file=sys.stderr, flush=True)

    # The table, fewest steps first.
    columns = sorted(STEPS)
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name in SAMPLERS:
        print(f"| {name} | {' | '.join(f'{found[name, steps]:.3f}' for steps in columns)} |")


# Guidance


def measure_guidance(args: argparse.Namespace) -> None:
    """Print how like its photos each guidance draws a subject, and how often the place is right."""
    tuned = tuned_of(args.tuned)
    # The judges of places, and the tuned models.
    train, _ = worlds(args.sprites)
    first_stage = load_model(WEIGHTS).first_stage_model

    def reconstruct(images: Tensor) -> Tensor:
        return first_stage(images, sample_posterior=False)[0]

    models = {subject: load_model(path) for subject, path in tuned.items()}
    of_judges = results_folder(args.outdir, WEIGHTS) / "recognizer.ckpt"
    judges = make_judges(CLIP_IMAGES, train, of_judges, reconstruct)

    # Guidance -> score -> "subject place" -> values. The bootstrap draws among the last.
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for kind, (subject, model) in itertools.product(GUIDANCE, models.items()):
        outdir = results_folder(args.outdir, WEIGHTS, tuned[subject])
        path = outdir / f"{subject}-{kind.replace(' ', '-')}.json"
        recipe = replace(RECIPE, **GUIDANCE[kind])
        scores = remembered(path, lambda: score(model, subject, recipe, judges))  # noqa: B023
        for name, values in scores.items():
            of_all = found.setdefault(kind, {}).setdefault(name, {})
            of_all |= {f"{subject} {place}": [value] for place, value in values.items()}
        print(f"{kind} {subject}", file=sys.stderr, flush=True)
    names = list(next(iter(found.values())))
    print(f"| guidance | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kind, scores in found.items():
        estimates = [estimate(scores[name]) for name in names]
        print(f"| {kind} | {' | '.join(map(written, estimates))} |")


def tuned_of(given: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoint of each subject."""
    pairs = [pair.partition("=") for pair in given]
    if not pairs or not all(path for _, _, path in pairs):
        text = " ".join(given)
        raise UserError(f"--tuned {text}: expected SUBJECT=CKPT, such as dog=logs/.../last.ckpt")
    check_once("--tuned", [subject for subject, _, _ in pairs])
    for subject, _, path in pairs:
        photos_of(subject)  # which raises where there are none
        if not Path(path).is_file():
            raise UserError(f"--tuned {subject}={path}: no such file")
    return {subject: Path(path) for subject, _, path in pairs}


def score(model: Any, subject: str, recipe: Recipe, judges: Judges) -> dict[str, dict[str, float]]:
    """Return score -> place -> its value for one picture of a subject in that place."""
    class_word = class_word_of(photos_of(subject))
    prompts, places = subject_prompts(f"sks {class_word}")
    seeds = [image_seed(recipe.seed, number) for number in range(len(prompts))]
    drawn = to_tensor(text_to_image(model, prompts, seeds, recipe), SIZE)
    photos = to_tensor([load_image(path) for path in find_images(photos_of(subject))], SIZE)
    scores: dict[str, dict[str, float]] = {}
    for name, encoder in judges.encoders.items():
        # Likeness is that of the middles: whole pictures are alike in their places, too.
        of_drawn, of_photos = (features_of(encoder, middle(x)) for x in (drawn, photos))
        alike = (of_drawn @ of_photos.T).mean(1)
        scores[f"subject, {name}"] = dict(zip(places, alike.tolist()))
    recognised = judges.recognise(drawn, "scene")
    right = [float(seen == wanted) for seen, wanted in zip(recognised, places)]
    scores["place recognised"] = dict(zip(places, right))
    return scores


def written(value: Estimate) -> str:
    """Return a mean and its interval as the tables have them."""
    if value.low is None or value.high is None:
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    measure = {"samplers": measure_samplers, "guidance": measure_guidance}[args.what]
    return exit_status(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
