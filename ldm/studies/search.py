"""Which values the trials of a sweep have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.errors import ParameterError, UserError
from ldm.rng import derive_seed

Values = dict[str, Any]
KINDS = ("grid", "list", "random", "optuna")


class Searcher(Protocol):
    """Says what to try next, and may learn from what came of it."""

    def ask(self, number: int) -> Values | None:
        """Return the values of a trial, the same whenever it is asked for; None for no more."""
        ...

    def tell(self, number: int, score: float | None) -> None:
        """Take the score of a trial, None of one that failed. More is better."""
        ...


class Fixed:
    """Trials that are known before any has run."""

    def __init__(self, trials: Sequence[Values]):
        self.trials = list(trials)

    def ask(self, number: int) -> Values | None:
        return self.trials[number] if number < len(self.trials) else None

    def tell(self, number: int, score: float | None) -> None:
        """Learn nothing."""


def grid(space: Mapping[str, Any]) -> Fixed:
    """Return every combination of the values; those of the last key change first."""
    for key, values in space.items():
        if not isinstance(values, list) or not values:
            raise ParameterError(f"set.{key}", f"a grid needs a list of values, got {values!r}")
    return Fixed([dict(zip(space, chosen)) for chosen in itertools.product(*space.values())])


def random(space: Mapping[str, object], trials: int, seed: int) -> Fixed:
    """Return values drawn at random: trial i of a seed is the same however many there are."""
    for key, given in space.items():
        _check_range(key, given)
    drawn = []
    for number in range(trials):
        generator = np.random.default_rng(derive_seed("sweep", seed, number))
        drawn.append({key: _draw(given, generator) for key, given in space.items()})
    return Fixed(drawn)


class Optuna:
    """Optuna's searcher by ask and tell. Its study is an SQLite file that optuna-dashboard opens.

    Args:
        file: of the study. One that is there goes on.
    """

    def __init__(self, space: Mapping[str, object], trials: int, seed: int, file: Path):
        try:
            import optuna
        except ImportError as error:
            raise UserError("search: optuna: needs its package: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.trials = optuna, trials
        self.space = {key: self._distribution(key, given) for key, given in space.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            storage=f"sqlite:///{file.resolve()}",
            study_name=file.parent.name,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            load_if_exists=True,
        )

    def ask(self, number: int) -> Values | None:
        if number >= self.trials:
            return None
        # A trial that was asked for before a kill keeps its values.
        while len(self.study.trials) <= number:
            self.study.ask(self.space)
        return dict(self.study.trials[number].params)

    def tell(self, number: int, score: float | None) -> None:
        if self.study.trials[number].state.is_finished():
            return
        failed = self.optuna.trial.TrialState.FAIL
        if score is None or not math.isfinite(score):
            self.study.tell(number, state=failed)
        else:
            self.study.tell(number, score)

    def _distribution(self, key: str, given: Any) -> Any:
        _check_range(key, given)
        kinds = self.optuna.distributions
        if isinstance(given, list):
            return kinds.CategoricalDistribution(given)
        low, high, is_log = given["low"], given["high"], bool(given.get("log"))
        if isinstance(low, int) and isinstance(high, int):
            return kinds.IntDistribution(low, high, log=is_log)
        return kinds.FloatDistribution(low, high, log=is_log)


def _check_range(key: str, given: object) -> None:
    """Raise a `UserError` for what is neither a list of values nor a range."""
    if isinstance(given, list) and given:
        return
    known = {"low", "high", "log"}
    if isinstance(given, Mapping) and {"low", "high"} <= set(given) <= known:
        low, high = given["low"], given["high"]
        numbers = all(isinstance(x, (int, float)) for x in (low, high))
        if numbers and low < high and (not given.get("log") or low > 0):
            return
    raise ParameterError(
        f"set.{key}",
        f"expected a list of values or {{low: 1.0e-6, high: 1.0e-4, log: true}}, got {given!r}",
    )


def _draw(given: Any, generator: np.random.Generator) -> Any:
    if isinstance(given, list):
        return given[int(generator.integers(len(given)))]
    low, high = given["low"], given["high"]
    if given.get("log"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = float(generator.uniform(low, high))
    whole = isinstance(low, int) and isinstance(high, int)
    return round(value) if whole else float(f"{value:.6g}")


def make_searcher(kind: str, space: object, trials: int | None, seed: int, file: Path) -> Searcher:
    """Return the searcher of a kind.

    Args:
        space: by key the values of a grid, or those and ranges; of a list, the trials themselves.
        trials: how many; needed by random and optuna.
    """
    if kind not in KINDS:
        raise ParameterError("search", f"'{kind}': accepted: {', '.join(KINDS)}")
    if kind == "list":
        if not isinstance(space, list) or not all(isinstance(v, Mapping) and v for v in space):
            raise ParameterError("set", "a list needs trials: [{key: value, ...}, ...]")
        return Fixed([dict(values) for values in space])
    if not isinstance(space, Mapping) or not space:
        raise ParameterError("set", "expected keys and their values")
    if kind == "grid":
        return grid(space)
    if not isinstance(trials, int) or trials < 1:
        raise ParameterError("trials", f"{kind} needs how many, got {trials!r}")
    return random(space, trials, seed) if kind == "random" else Optuna(space, trials, seed, file)
