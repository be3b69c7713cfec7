"""The rows of a table: measured in turn, in rounds, each in a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.benchmark import report
from ldm.benchmark.isolation import in_own_process
from ldm.benchmark.machine import machine, matmul_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What measures a variant, how many images it takes or makes at a time, and its precision, of
    `DTYPES`.

    The measuring process gets `environment` beside its own variables.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    images: int
    dtype: str
    environment: Mapping[str, str] = field(default_factory=dict)


def measure_rows(
    rows: Sequence[Row], device: str, compared_to: str, repeat: int = 1, clock: str = "wall"
) -> dict[str, Any]:
    """Measure every row `repeat` times, in turns, so that what else the machine does meets all of
    them.

    Returns:
        `variants`, one dict of figures for each row; `compared_to`; and the facts of the `machine`.
    """
    threads = torch.get_num_threads()
    dtypes = dict.fromkeys(row.dtype for row in rows)
    rates = {dtype: in_own_process(matmul_rate, device, dtype, threads, clock) for dtype in dtypes}
    measured: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for number in range(repeat):
        for row in rows:
            log.info(
                "measuring %s%s", row.name, f" ({number + 1} of {repeat})" if repeat > 1 else ""
            )
            measured[row.name].append(
                in_own_process(row.function, *row.arguments, environment=row.environment)
            )
    variants = []
    for row in rows:
        figures = report.figures(report.merged(measured[row.name]), row.images, rates[row.dtype])
        variants.append({"name": row.name, "dtype": row.dtype, **figures})
    report.compare(variants, compared_to)
    facts = {**machine(device), "matmul_flops_per_second": rates}
    return {"compared_to": compared_to, "variants": variants, "machine": facts}
