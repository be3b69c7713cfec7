"""The page `docs/results.md`: tables of what `scripts/tiny/evaluate.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ldm.tiny.attributes import KINDS, PER_WORD
from ldm.tiny.measure import CLASS_IMAGES, FRECHET, OF_EACH_CLASS, PLACES
from ldm.tiny.scenes import SCENES

WITH, WITHOUT = "with prior preservation", "without"

Results = dict[str, Any]
Runs = Mapping[tuple[str, str, int], Results]  # (kind, subject, seed) -> results

HEAD = """# Results of the miniature

Measured by the command below, with the weights in `models/tiny` and `configs/tiny/dreambooth.yaml`.
Class, scene, style, material, view and accessory are read off by linear classifiers on feature
maps of EfficientNet-Lite0. They are fitted to renderings of the tiny world (half of them
reconstructed by the first stage), never to samples.
`CLIP-I` is the mean cosine of our small CLIP's image features, the other encoder is
EfficientNet-Lite0, pretrained on ImageNet.
"""

BASE = """
## The base model

4 samples for each of {classes} classes ("a photo of a dog") and of {scenes} scenes ("a photo of a
dog in the snow", classes in turn); diversity is the mean pairwise distance of the features of
{pictures} pictures of "a photo of a dog".

| | samples | renderings of seen designs | of unseen designs |
|---|---|---|---|"""

ATTRIBUTES = """
## Styles, materials, views and accessories

{count} samples for each word, with classes that can show it; the words are read off by linear
classifiers that may also answer "none". Beside them renderings of unseen designs that show a word
of this kind, and nothing of another kind.

| | samples | renderings | by word |
|---|---|---|---|"""

APPLICATIONS = """
## The subject in styles, materials and views, and with accessories

{count} pictures for each word: the share in which it is recognised (in brackets: the class by the
base model), and how much of the gap between the class's pictures for these prompts and the photos
is closed, EfficientNet-Lite0.

| subject | style | material | view | accessory |
|---|---|---|---|---|"""

SUBJECTS = """
## DreamBooth, {kind}

Means over seeds {seeds}; likeness is that of the pictures' middles, 70 % of each side. *Gap
closed*: how much of the way from the base model's pictures of the class to the photos' own likeness
the pictures of "photo of a sks dog" have gone. *Scenes*: share of {places} scenes recognised with
the subject in them, and with the class by the base model.
*Class drift*: likeness of "photo of a dog" to the photos, both centred on the base model's
pictures: 0 for no change, and in brackets that of "photo of a sks dog".
*Diversity kept*: of "photo of a dog", after / before. *Nearest*: the sample most like a training
image or its mirror, in dB.

| subject | {columns} |
|---|---|---|---|---|---|---|---|---|---|---|"""

COLUMNS = (
    *("gap closed, CLIP-I", "EfficientNet", "scenes (base)", "class drift, CLIP-I", "EfficientNet"),
    *(
        "diversity kept, CLIP-I",
        "EfficientNet",
        "class recognised (base)",
        "nearest, dB",
        "minutes",
    ),
)


def report_of(command: str, base: Results, runs: Runs) -> str:
    """Return the page, in Markdown, with the `command` that made it."""
    lines = [HEAD, f"    {command}\n", *base_table(base), *attribute_table(base)]
    return "\n".join([*lines, *run_tables(runs), *application_table(runs)]) + "\n"


def base_table(base: Mapping[str, Any]) -> list[str]:
    """Return the base model's numbers."""
    lines = [BASE.format(classes=len(base["by_class"]), scenes=len(SCENES), pictures=CLASS_IMAGES)]
    for name in ("class", "scene"):
        seen, unseen = (base[f"{name}, {kind} designs"] for kind in ("seen", "unseen"))
        lines.append(f"| {name} recognised | {base[name]:.0%} | {seen:.0%} | {unseen:.0%} |")
    for encoder in ("CLIP-I", "EfficientNet-Lite0"):
        made, real = base[f"diversity, {encoder}"], base[f"diversity of renderings, {encoder}"]
        lines.append(
            f"| diversity, {encoder} | {made:.3f} ({made / real:.0%} of renderings) "
            f"| {real:.3f} | |"
        )
    varied = listed(base["diversity by class"])
    return [
        *lines,
        "",
        f"By class: {listed(base['by_class'])}.",
        "",
        f"Diversity of {OF_EACH_CLASS} pictures of each class, EfficientNet-Lite0, as a share of "
        f"that of renderings: {varied}.",
        "",
        f"Fréchet distance of EfficientNet-Lite0's features, {FRECHET} samples and as many unseen "
        f"renderings with the same captions: {base['fréchet']:.3f}; of renderings of seen designs "
        f"{base['fréchet of renderings']:.3f}. The decoder gives unseen renderings back at "
        f"{base['decoder, plain']:.1f} dB, and those in styles and materials, too, at "
        f"{base['decoder']:.1f} dB.",
    ]


def listed(shares: Mapping[str, float]) -> str:
    """Return shares by name as a line of text, the smallest first."""
    in_order = sorted(shares.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in in_order)


def attribute_table(base: Mapping[str, Any]) -> list[str]:
    """Return how often the base model shows a style, a material, a view and an accessory."""
    lines = [ATTRIBUTES.format(count=PER_WORD)]
    for kind in KINDS:
        by_word = listed(base[f"by {kind}"])
        lines.append(
            f"| {kind} | {base[kind]:.0%} | {base[f'{kind}, unseen designs']:.0%} | {by_word} |"
        )
    return lines


def application_table(runs: Runs) -> list[str]:
    """Return how often subjects are recognised in styles, materials and views and what they wear.

    The lines are empty where no run measured it.
    """
    found = {key: value["applications"] for key, value in runs.items() if key[0] == WITH}
    if not found:
        return []
    lines = [APPLICATIONS.format(count=PER_WORD // 2)]
    for subject in sorted({subject for _, subject, _ in found}):
        results = [value for (_, name, _), value in found.items() if name == subject]
        lines.append(f"| {subject} | {' | '.join(application_cell(results, k) for k in KINDS)} |")
    means = " | ".join(application_cell(list(found.values()), kind) for kind in KINDS)
    return [*lines, f"| **mean** | {means} |"]


def application_cell(results: Sequence[Results], kind: str) -> str:
    """Return the share recognised, that of the class, and how much of the gap is closed."""
    recognised = mean(result[kind] for result in results)
    base = mean(result[f"{kind}, base"] for result in results)
    closed = mean(result[f"{kind}, EfficientNet-Lite0 gap closed"] for result in results)
    return f"{recognised:.0%} ({base:.0%}), {closed:.0%}"


def run_tables(runs: Runs) -> list[str]:
    """Return a table for each kind of run."""
    lines: list[str] = []
    for kind in (WITH, WITHOUT):
        found = {key: value for key, value in runs.items() if key[0] == kind}
        if not found:
            continue
        different = sorted({seed for _, _, seed in found})
        seeds = ", ".join(map(str, different))
        heading = kind if kind == WITH else "without prior preservation"
        fields = {
            "kind": heading,
            "seeds": seeds,
            "places": len(PLACES),
            "columns": " | ".join(COLUMNS),
        }
        lines.append(SUBJECTS.format(**fields))
        subjects = sorted({subject for _, subject, _ in found})
        rows = {
            s: [value for (_, subject, _), value in found.items() if subject == s] for s in subjects
        }
        lines += [row(name, results) for name, results in rows.items()]
        if len(rows) > 1:
            lines.append(row("**mean**", list(found.values())))
    return lines


def row(name: str, results: Sequence[Results]) -> str:
    """Return one row of a table: the means of some runs."""
    numbers = [key for key in results[0] if key != "applications"]
    m = {key: mean(result[key] for result in results) for key in numbers}
    clip, effnet = "CLIP-I", "EfficientNet-Lite0"
    cells = [
        name,
        *(f"{m[f'{e}, gap closed']:.0%}" for e in (clip, effnet)),
        f"{m['scenes']:.0%} ({m['scenes, base']:.0%})",
        *(
            f"{m[f'{e}, class drift']:.2f} ({m[f'{e}, centred subject']:.2f})"
            for e in (clip, effnet)
        ),
        *(f"{m[f'{e}, diversity kept']:.0%}" for e in (clip, effnet)),
        f"{m['class kept']:.0%} ({m['class, base']:.0%})",
        f"{max(result['nearest training image, dB'] for result in results):.1f}",
        f"{m['seconds'] / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"
