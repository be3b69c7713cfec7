"""A sweep: trials of the training command with other values, their table and their page."""

from __future__ import annotations

import csv
import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.callbacks.early_stop import StopOnFixedLoss
from ldm.config import load_yaml, save_yaml, to_plain
from ldm.errors import ParameterError, UserError, under
from ldm.evaluation.prompt_suites import filled, read_suite
from ldm.files import write_atomically
from ldm.reports.runs import FIXED, LOSS, read_run
from ldm.reports.sweeps import sweep_page
from ldm.studies.engines import Engine, Failure, Task
from ldm.studies.scoring import Scoring
from ldm.studies.search import KINDS, Searcher, Values, make_searcher
from ldm.studies.training import trained
from ldm.util import check_params

log = logging.getLogger(__name__)

TABLE, PAGE, PLAN, TRIALS, STUDY = "table.csv", "index.html", "sweep.yaml", "trials", "study.db"
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Plan:
    """What a sweep tries.

    Args:
        arguments: of the training command, for every trial: the base config, photos, class word.
        set: the values by key, see `make_searcher`. A key with a dot is one of the YAML; any other
            is a flag, such as `seed`.
        search: grid, list, random or optuna.
        trials: how many, of random and optuna.
        seed: of the search.
        score: how trained models are scored, see `Scoring`, with `prompts`, a suite's file; None
            for the losses alone.
        early_stop: what ends a trial early, see `StopOnFixedLoss`; None for nothing.
        objective: what optuna makes larger, such as `DINO`; smaller with a `-` before it.
    """

    arguments: list[str]
    set: Any
    search: str = "grid"
    trials: int | None = None
    seed: int = 0
    score: dict[str, Any] | None = None
    early_stop: dict[str, Any] | None = None
    objective: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Plan:
        """Return the plan that a YAML describes; raise a `UserError` for what is none."""
        check_params(cls, given, "sweep")
        plan = cls(**given)
        words = plan.arguments
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ParameterError("arguments", f"expected a list of texts, got {words!r}")
        for name in ("score", "early_stop"):
            value = getattr(plan, name)
            if value is not None and not isinstance(value, dict):
                raise ParameterError(name, f"expected keys and values, got {value!r}")
        if plan.early_stop is not None:
            check_params(StopOnFixedLoss, plan.early_stop, "early_stop")
            with under("early_stop"):
                StopOnFixedLoss(**plan.early_stop)
        if plan.search not in KINDS:
            raise ParameterError("search", f"'{plan.search}': accepted: {', '.join(KINDS)}")
        if plan.search == "optuna" and not plan.objective:
            raise ParameterError("objective", "optuna needs one, such as -val/loss_subject_fixed")
        if plan.score is not None:
            scoring, prompts = plan.scoring()
            read_suite(prompts)
            if scoring.load().dino is None and scoring.load().clip_image is None:
                raise ParameterError("score.encoders", "none of dino and clip")
        return plan

    def scoring(self) -> tuple[Scoring, Path]:
        """Return how models are scored, and the suite of prompts."""
        given = dict(self.score or {})
        prompts = given.pop("prompts", None)
        if not prompts or not isinstance(prompts, str):
            raise ParameterError("score.prompts", f"expected a suite's file, got {prompts!r}")
        return Scoring.of(given, "score"), Path(prompts)


def read_plan(path: Path) -> Plan:
    """Read a sweep's YAML."""
    return Plan.of(to_plain(load_yaml(path)))


def run_sweep(plan: Plan, outdir: Path, engine: Engine) -> list[dict[str, Any]]:
    """Run what is missing of a sweep, and write its table and page after each trial.

    Returns:
        a row for each trial, as in the table.

    Raises:
        UserError: the folder holds another sweep.
    """
    _settle(plan, outdir)
    searcher = make_searcher(plan.search, plan.set, plan.trials, plan.seed, outdir / STUDY)
    for task, result in engine.run(run_trial, _tasks(plan, searcher, outdir)):
        if isinstance(result, Failure):
            log.error("trial %s: %s", task["name"], result.message)
            result = {"values": task["values"], "status": FAILED, "message": result.message}
            _write(Path(task["folder"]) / f"{task['name']}.failed.json", result)
        searcher.tell(task["number"], _objective(plan, result))
        write_table(outdir)
    return write_table(outdir)


def _settle(plan: Plan, outdir: Path) -> None:
    """Write the plan into its folder, or compare it with the one that is there."""
    path, content = outdir / PLAN, asdict(plan)
    if path.is_file():
        before = to_plain(load_yaml(path))
        check_params(Plan, before, str(path))
        # What an older version did not know has its default.
        if asdict(Plan(**before)) != json.loads(json.dumps(content)):
            raise UserError(f"{outdir}: holds another sweep; choose another --outdir")
        return
    (outdir / TRIALS).mkdir(parents=True, exist_ok=True)
    write_atomically(path, functools.partial(save_yaml, content))


def _tasks(plan: Plan, searcher: Searcher, outdir: Path) -> Iterator[Task]:
    """Yield the trials that are not done, in their order; tell the searcher of the others."""
    number = 0
    while (values := searcher.ask(number)) is not None:
        name = f"{number:03}"
        folder = (outdir / TRIALS).resolve()
        before = _read(folder / f"{name}.json")
        if before is not None and before["values"] == values:
            searcher.tell(number, _objective(plan, before))
        else:
            (folder / f"{name}.failed.json").unlink(missing_ok=True)
            yield {
                "name": name,
                "number": number,
                "values": values,
                "folder": str(folder),
                "arguments": [*plan.arguments, *_early_stop(plan), *words(values)],
                "score": plan.score,
            }
        number += 1


def _early_stop(plan: Plan) -> list[str]:
    """Return the words that let the losses at fixed noise end a trial."""
    if plan.early_stop is None:
        return []
    callback = {"target": "ldm.callbacks.early_stop.StopOnFixedLoss", "params": plan.early_stop}
    return [f"lightning.callbacks.early_stop={json.dumps(callback)}"]


def words(values: Values) -> list[str]:
    """Return values as words of the training command."""
    found = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        found += [f"{key}={text}"] if "." in key else [f"--{key}", text]
    return found


def run_trial(task: Task) -> dict[str, Any]:
    """Train, draw and score one trial, each as far as it is not done; return its numbers."""
    folder, name = Path(task["folder"]), task["name"]
    begin = time.monotonic()
    run = trained(name, folder, task["arguments"], folder / f"{name}.run")
    facts = read_run(run)
    numbers = {**facts.last(LOSS), **facts.last(FIXED)}
    pinned: dict[str, str] = {}
    if task["score"] is not None:
        given = dict(task["score"])
        prompts = given.pop("prompts")
        scoring = Scoring.of(given, "score")
        class_word = facts.settings.get("data.params.train.params.placeholder_token")
        identifier = facts.settings.get("data.params.train.params.identifier", "sks")
        photos = facts.settings.get("data.params.train.params.data_root")
        if not class_word or not photos:
            raise UserError(f"{run}: its config says no class word or no photos: nothing to score")
        texts = filled(read_suite(prompts), class_word, identifier)
        numbers |= scoring.score(
            run / "checkpoints/last.ckpt",
            Path(photos),
            texts,
            f"photo of a {class_word}",
            run / "samples",
            run / "samples_of_class",
            identifier,
        )
        pinned = scoring.pinned()
    result = {"values": task["values"], "status": DONE, "run": run.name}
    result |= {"numbers": numbers, "pinned": pinned}
    _write(folder / f"{name}.json", result)
    log.info("trial %s: done in %.1f min", name, (time.monotonic() - begin) / 60)
    return result


def write_table(outdir: Path) -> list[dict[str, Any]]:
    """Write `table.csv` and the page of what there is, a row a trial; return the rows."""
    folder = outdir / TRIALS
    rows = []
    for path in sorted(folder.glob("[0-9][0-9][0-9]*.json")):
        result = _read(path)
        if result is not None:
            row = {"trial": path.name.partition(".")[0], **result["values"]}
            found = {**result.get("numbers", {}), **result.get("pinned", {})}
            rows.append({**row, "status": result["status"], **found})
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    if rows:
        write_atomically(outdir / TABLE, write)
        runs = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.run")}
        page = sweep_page(outdir.resolve().name, rows, {n: folder / r for n, r in runs.items()})
        page.save(outdir / PAGE)
    return rows


def _objective(plan: Plan, result: Mapping[str, Any]) -> float | None:
    """Return what a result is worth to the searcher; None where it is not known."""
    if plan.objective is None:
        return None
    value = result.get("numbers", {}).get(plan.objective.removeprefix("-"))
    if value is None:
        return None
    return -value if plan.objective.startswith("-") else value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
