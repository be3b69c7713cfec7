"""The paper's protocol: fine-tune on each subject, draw, score; one row a method."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.export import sha256
from ldm.config import IDENTIFIER
from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.errors import UserError
from ldm.evaluation.dreambench import Subject
from ldm.evaluation.scores import MEASURED, REAL, Scored, score_real
from ldm.evaluation.tables import difference_table, differences, score_table
from ldm.files import write_atomically
from ldm.reports.protocols import protocol_page
from ldm.sampling.contact_sheet import contact_sheet
from ldm.studies.engines import Engine, Failure, Task
from ldm.studies.scoring import Scoring
from ldm.studies.training import settle_flags, trained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """What a method changes.

    Args:
        arguments: words of the training command. {identifier} and {class_word} are the subject's.
        noun: the class noun in captions and prompts, instead of the subject's; "" for none.
        trains: whether there is a training at all; without one the base model draws the class.
    """

    arguments: Sequence[str] = ()
    noun: str | None = None
    trains: bool = True

    @property
    def class_images(self) -> bool:
        """Return whether the training reads class images."""
        return NO_CLASS_IMAGES not in self.arguments

    @property
    def own_class_images(self) -> bool:
        """Return whether its class images are others than those of its noun's other trainings."""
        return any(word.startswith(CLASS_IMAGES_KEYS) for word in self.arguments)

    def words(self, subject: Subject, identifier: str, common: Sequence[str]) -> list[str]:
        """Return the words of the training command for a subject, without its photos."""
        noun = self.noun or subject.class_word
        words = ["--class_word", noun]
        for text in (*common, *self.arguments):
            words.append(text.replace("{class_word}", noun).replace("{identifier}", identifier))
        return words

    def prompts(self, subject: Subject, identifier: str) -> list[str]:
        """Return the subject's prompts, in the words that the method's model has learned."""
        return subject.prompts(identifier if self.trains else "", self.noun)

    def seeds(self, given: Sequence[int]) -> Sequence[int]:
        """Return the seeds of its trainings; without a training all pictures are the same."""
        return given if self.trains else given[:1]


PRESERVATION = "model.params.preservation"
NO_CLASS_IMAGES = "data.params.num_class_images=0"
CLASS_IMAGES_KEYS = ("data.params.num_class_images=", "data.params.class_images")
METHODS: dict[str, Method] = {
    "base": Method(trains=False),
    "dreambooth": Method(),
    "no-prior": Method(["model.params.reg_weight=0"]),
    # Other ways to keep the prior; the last two need no class images.
    "prior_prediction": Method([f"{PRESERVATION}=prior_prediction"]),
    "dop": Method([f"{PRESERVATION}=dop", NO_CLASS_IMAGES]),
    "blank": Method([f"{PRESERVATION}=blank", NO_CLASS_IMAGES]),
    "lora": Method(
        [
            "model.params.lora={rank: 8, alpha: 8.0}",
            "model.params.use_ema=false",
            "model.base_learning_rate=1.0e-4",
        ]
    ),
    # The identifier is a new word, so that all methods have the same prompts.
    "textual_inversion": Method(
        [
            "model.params.personalization_config={target: ldm.modules.embedding_manager."
            "EmbeddingManager, params: {placeholder_strings: ['{identifier}']}}",
            "model.params.unfreeze_model=false",
            "model.params.use_ema=false",
            f"{PRESERVATION}=none",
            "model.base_learning_rate=5.0e-3",
            "--init_word",
            "{class_word}",
        ]
    ),
    # The paper's Table 4. Without a noun the prior is that of the right class; with the wrong one
    # it is that of the wrong class, as the mistake would make it.
    "no-noun": Method(["data.params.train.params.templates=photo of a {identifier}"], noun=""),
    "wrong-noun": Method(noun="can"),
}
TABLE, SCORES_FILE, PAGE = "table.md", "scores.csv", "index.html"
SHEET_SUBJECTS, SHEET_PROMPTS = 6, 6


@dataclass(frozen=True)
class Bench:
    """What is run.

    Args:
        subjects: of the dataset.
        methods: by name.
        common: words of the training command that all methods have.
        seeds: a training of each subject and method for each.
        scoring: how pictures are drawn and scored.
        identifier: the rare word of the prompts.
    """

    subjects: list[Subject]
    methods: dict[str, Method]
    common: list[str]
    seeds: list[int]
    scoring: Scoring
    ckpt: Path
    identifier: str = IDENTIFIER


def run_bench(bench: Bench, outdir: Path, engine: Engine) -> dict[str, Scored]:
    """Do what is missing of the protocol, then write the table and the page.

    Raises:
        UserError: a task failed; the others are done, and the same command tries it again. Or the
            folder has a method with other flags.
    """
    photos = {f"photos of {subject.name}": _photos(subject) for subject in bench.subjects}
    flags = {name: _flags(bench, method) for name, method in bench.methods.items()}
    settle_flags(outdir, {**flags, **photos})
    failures = []
    try:
        for task, result in engine.run(run_subject, tasks(bench, outdir.resolve())):
            if isinstance(result, Failure):
                failures.append(f"{task['name']}: {result.message}")
                log.error("%s", failures[-1])
            else:
                log.info("%s: %s", task["name"], {k: round(v, 4) for k, v in result.items()})
    finally:  # a protocol that is stopped has a table of what is done
        rows = write_results(bench, outdir)
    if failures:
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}; the same command tries again")
    return rows


def _flags(bench: Bench, method: Method) -> list[str]:
    """Return all that makes a method's trainings what they are, beside the subject and the seed."""
    if not method.trains:
        return [str(bench.ckpt)]
    noun = [] if method.noun is None else [f"noun '{method.noun}'"]
    return [*bench.common, *method.arguments, *noun, f"--identifier {bench.identifier}"]


def _photos(subject: Subject) -> list[str]:
    """Return a subject's photos by name and content."""
    return [f"{path.name} {sha256(path)[:8]}" for path in find_images(subject.photos)]


def tasks(bench: Bench, outdir: Path) -> Iterator[Task]:
    """Yield a task for each seed, method and subject that has no scores yet.

    All of the first seed come first: a protocol that is stopped has something of every method.
    """
    for seed, (name, method) in itertools.product(bench.seeds, bench.methods.items()):
        for subject in bench.subjects if seed in method.seeds(bench.seeds) else []:
            task = _task(bench, outdir, name, seed, subject)
            if _scores(task, bench) is None:
                words = _training(bench, outdir, name, seed, subject, task)
                yield {**task, "arguments": words if method.trains else []}


def _training(
    bench: Bench, outdir: Path, name: str, seed: int, subject: Subject, task: Task
) -> list[str]:
    """Return the words of the training command for a task."""
    method = bench.methods[name]
    noun = method.noun or subject.class_word
    folder = outdir / "class_images" / noun.replace(" ", "_")  # of all trainings of the class
    if method.own_class_images:
        folder = folder.with_name(f"{folder.name}-{name}")
    words = ["--data_root", str(subject.photos)]
    if method.class_images:
        words += ["--reg_data_root", str(folder)]
    words.append(f"lightning.callbacks.timing.params.file={json.dumps(task['timing'])}")
    words += ["--seed", str(seed), *method.words(subject, bench.identifier, bench.common)]
    if bench.identifier != IDENTIFIER:
        words.append(f"data.params.train.params.identifier={bench.identifier}")
    return words


def _task(bench: Bench, outdir: Path, name: str, seed: int, subject: Subject) -> Task:
    return {
        "name": f"{name}-{subject.name}-{seed}",
        "runs": str(outdir / "runs"),
        "ckpt": str(bench.ckpt.resolve()),
        "timing": str(outdir / "runs" / f"{name}-{subject.name}-{seed}.timing.json"),
        "result": str(outdir / "scores" / name / f"{subject.name}-{seed}.json"),
        # As scripts/evaluate.py reads them: --images images/METHOD --real dataset.
        "images": str(outdir / "images" / name / subject.name / f"seed{seed}"),
        "of_class": str(outdir / "class" / name / subject.name / f"seed{seed}"),
        "photos": str(subject.photos),
        "prompts": bench.methods[name].prompts(subject, bench.identifier),
        "texts": subject.prompts(bench.identifier),
        "class_prompt": f"a photo of a {subject.class_word}",
        "identifier": bench.identifier,
        "scoring": asdict(bench.scoring),
    }


def run_subject(task: Task) -> dict[str, float]:
    """Train, draw and score one subject, each as far as it is not done."""
    runs, name = Path(task["runs"]), task["name"]
    checkpoint = Path(task["ckpt"])
    if task["arguments"]:
        run = trained(name, runs, task["arguments"], runs / f"{name}.run")
        checkpoint = run / "checkpoints/last.ckpt"
    scoring = Scoring.of(task["scoring"], "score")
    scores = scoring.score(
        checkpoint,
        Path(task["photos"]),
        task["prompts"],
        task["class_prompt"],
        Path(task["images"]),
        Path(task["of_class"]),
        task["identifier"],
        task["texts"],
    )
    scores |= costs(Path(task["timing"])) if task["arguments"] else {}
    content = {"scoring": task["scoring"], "prompts": task["prompts"], "scores": scores}
    content["encoders"] = scoring.pinned()["encoders"]
    text = json.dumps(content)
    write_atomically(Path(task["result"]), lambda path: path.write_text(text, encoding="utf-8"))
    return scores


def costs(timing: Path) -> dict[str, float]:
    """Return what a training took, as its callback measured it; nothing where that is not there."""
    try:
        found = json.loads(timing.read_text(encoding="utf-8"))
    except OSError:  # a run of before
        return {}
    taken = {"GB": found["peak_bytes"] / 1e9}
    # The first step warms up and is not measured: a run of one step has no seconds.
    if found["seconds_per_step"] is not None:
        taken["seconds"] = found["seconds_per_step"] * found["steps"]
    return taken


def _scores(task: Task, bench: Bench) -> dict[str, float] | None:
    """Return the scores that a task has written, if they were asked for in the same way."""
    try:
        found = json.loads(Path(task["result"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = found["scoring"] == asdict(bench.scoring) and found["prompts"] == task["prompts"]
    # The weights of an encoder may have changed under the same name. Older files do not say them.
    now = bench.scoring.pinned()["encoders"]
    same = same and found.get("encoders", now) == now
    return found["scores"] if same else None


def write_results(bench: Bench, outdir: Path) -> dict[str, Scored]:
    """Write the table, every score and the page, of what there is."""
    rules, encoders = bench.scoring.rules(), bench.scoring.load()
    rows = {REAL: Scored(rules.name, encoders.hashes)}
    for subject in bench.subjects:
        photos = [load_image(path) for path in find_images(subject.photos)]
        own: dict[str, object] = {"subject": subject.name, "seed": ""}
        rows[REAL].rows.append(own | score_real(photos, encoders))
    for name, method in bench.methods.items():
        rows[name] = Scored(rules.name, encoders.hashes)
        for seed in method.seeds(bench.seeds):
            for subject in bench.subjects:
                found = _scores(_task(bench, outdir.resolve(), name, seed, subject), bench)
                if found is not None:
                    of = str(seed) if method.trains else ""
                    row: dict[str, object] = {"subject": subject.name, "seed": of}
                    rows[name].rows.append(row | found)
    lacking = _lacking(bench, rows)
    rows = {name: scored for name, scored in rows.items() if scored.rows}
    text = score_table(rows, rules)
    if lacking:
        text += f"\n\n{lacking}"
    first = next(
        (name for name, method in bench.methods.items() if method.trains and name in rows), ""
    )
    compared = differences(rows, first) if first else {}
    if compared:
        text += f"\n\n{difference_table(compared, first)}"
    write_atomically(outdir / TABLE, lambda path: path.write_text(text, encoding="utf-8"))
    pinned = bench.scoring.pinned()
    write_atomically(outdir / SCORES_FILE, lambda path: _write_csv(path, rows, pinned))
    drawn = {method: _sheet(bench, outdir, method) for method in bench.methods if method in rows}
    sheets = [(method, path) for method, path in drawn.items() if path is not None]
    settings: Mapping[str, Any] = {
        **{f"method {name}": " ".join(method.arguments) for name, method in bench.methods.items()},
        "flags of all methods": " ".join(bench.common),
        "subjects": ", ".join(subject.name for subject in bench.subjects),
        "seeds": ", ".join(map(str, bench.seeds)),
        **asdict(bench.scoring),
    }
    page = protocol_page("DreamBench", rows, rules, sheets, settings, first, lacking)
    page.save(outdir / PAGE)
    return rows


def _lacking(bench: Bench, rows: Mapping[str, Scored]) -> str:
    """Say whose scores are not all there: means of other subjects do not compare."""
    found = []
    for name, method in bench.methods.items():
        all_of_it = len(bench.subjects) * len(method.seeds(bench.seeds))
        if (missing := all_of_it - len(rows[name].rows)) > 0:
            found.append(f"{missing} of {all_of_it} of {name}")
    return f"Not there: {', '.join(found)}. A mean is of what there is." if found else ""


def _write_csv(path: Path, rows: Mapping[str, Scored], pinned: Mapping[str, str]) -> None:
    """Write every score in a row with what pins it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", "subject", "seed", *MEASURED, *pinned])
        writer.writeheader()
        for name, scored in rows.items():
            writer.writerows({"method": name, **row, **pinned} for row in scored.rows)


def _caption(prompt: str, subject: Subject, identifier: str) -> str:
    """Return what a prompt asks for beside the subject: there is room for a few words."""
    start = f"a {identifier} {subject.class_word} "
    return prompt.removeprefix(start).removeprefix(f"a {subject.class_word} ")


def _sheet(bench: Bench, outdir: Path, method: str) -> Path | None:
    """Draw the first pictures of the first subjects on a sheet; None where none is drawn yet."""
    rows: list[Any] = []
    for subject in bench.subjects[:SHEET_SUBJECTS]:
        folder = outdir / "images" / method / subject.name / f"seed{bench.seeds[0]}"
        firsts = sorted(folder.glob("*-0.png"))[:SHEET_PROMPTS]
        if not firsts:  # it is still to be trained
            continue
        photo = ("a photo", load_image(find_images(subject.photos)[0]))
        prompts = bench.methods[method].prompts(subject, bench.identifier)
        captions = [_caption(prompt, subject, bench.identifier) for prompt in prompts]
        rows.append((subject.name, [photo, *zip(captions, map(load_image, firsts))]))
    if not rows:
        return None
    path = outdir / f"{method}.png"
    write_atomically(path, lambda temporary: contact_sheet(rows).save(temporary, "PNG"))
    return path
