"""The exceptions for what a user gave and can mend."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line that names it and the way out. The commands print it alone, without a
    traceback, and exit with status 1.
    """


class ParameterError(UserError):
    """A parameter has a value that cannot be used.

    Code names its own parameter alone. `ldm.util.instantiate_from_config`, which knows where the
    parameter stands in the YAML, adds the path: each level of a config adds its part, once.

    Args:
        parameter: the name, such as `repeats`; a dotted path inside a parameter that is a mapping.
        problem: what is wrong with the value, what would be right, and the value.
    """

    def __init__(self, parameter: str, problem: str):
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Pass the two arguments to pickle: a worker process hands its errors over in this way."""
        return type(self), (self.parameter, self.problem)

    def under(self, path: str) -> ParameterError:
        """Return the same error, its parameter under a path of the config."""
        return ParameterError(f"{path}.{self.parameter}", self.problem)


@contextmanager
def under(path: str) -> Iterator[None]:
    """Put a path before the parameter that an error names, inside the context."""
    try:
        yield
    except ParameterError as error:
        raise error.under(path) from error


def check_share(name: str, value: object) -> None:
    """Raise a `ParameterError` for what is no share of a whole."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ParameterError(name, f"expected a share from 0 to 1, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise a `ParameterError` for what is no finite number above 0."""
    if not 0 < value < math.inf:
        raise ParameterError(name, f"expected a positive number, got {value}")


def check_counts(**numbers: object) -> None:
    """Raise a `ParameterError` for the first of some values that is no number, or is below 1."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not 1 <= number < math.inf:
            raise ParameterError(name, f"expected 1 or more, got {number}")


def check_once(flag: str, values: Iterable[object]) -> None:
    """Raise a `UserError` for a value that a flag has twice: it would count twice."""
    seen = set[object]()
    for value in values:
        if value in seen:
            raise UserError(f"{flag} {value}: given twice")
        seen.add(value)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
