"""Everything that only a GPU can say, in pieces: what is right, what is fast, what memory it takes.

A piece runs in a process of its own and leaves a JSON file, so that a day that was cut short goes
on where it was. A piece that fails says why, and the others go on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.benchmark import correctness, report, rows, sample
from ldm.benchmark.load import random_weights
from ldm.benchmark.machine import machine
from ldm.benchmark.predict import predict
from ldm.benchmark.train import OURS, Settings, measure_training
from ldm.benchmark.variants import checked_config, training_rows
from ldm.config import save_yaml
from ldm.errors import UserError
from ldm.files import first_line, write_atomically
from ldm.host import CUDA

log = logging.getLogger(__name__)

UNET = "model.params.unet_config.params"


@dataclass(frozen=True)
class Piece:
    """One measurement. `group` is the table that it is a row of, `name` its row.

    Args:
        images: of a step or of a drawn batch; 0 for a check.
        dtype: of `ldm.checkpoints.export.DTYPES`, whose matrix product is the peak.
    """

    group: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    images: int = 0
    dtype: str = "bf16"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Return the name of the file with what was found."""
        plain = "".join(c if c.isalnum() else "-" for c in f"{self.group} {self.name}")
        return f"{plain}.json"


@dataclass(frozen=True)
class Day:
    """What is measured, and how.

    Args:
        base: the fine-tuning config of the model that is timed.
        profiles: configs over it, each for a card of some size.
        small: the config of the model that checks train.
        device: its kind, as torch names it.
        folder: where pieces and weights lie.
        size: pixels of an image's side; None for the config's.
        batches: subject images of a step; as many class images come with them.
        compile: how checks compile.
    """

    base: Path
    profiles: Sequence[Path]
    small: Mapping[str, Any]
    device: str
    folder: Path
    size: int | None = None
    batches: tuple[int, int] = (1, 8)
    precision: str = "bf16-mixed"
    training: Settings = field(default_factory=Settings)
    sampling: sample.Settings = field(default_factory=sample.Settings)
    compile: Mapping[str, Any] = field(default_factory=dict)
    theirs: Sequence[str] = ("diffusers",)

    def pieces(self) -> list[Piece]:
        """List everything, what matters most first."""
        small, large = self.batches
        timed = [*self._trainings(small, SWITCHES), *self._trainings(large, LARGE_SWITCHES)]
        ours_and_theirs = [piece for piece in timed if piece.name in (OURS, *self.theirs)]
        switched = [piece for piece in timed if piece not in ours_and_theirs]
        return [
            *self._checks(),
            *ours_and_theirs,
            *self._samplings(),
            *self._profiles(),
            *switched,
        ]

    def _checks(self) -> list[Piece]:
        lower = [*correctness.PRECISIONS] if self.device == CUDA else ["bf16-mixed"]
        found: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
        for precision in lower:
            found += [
                (f"recomputed under {precision}", correctness.recomputation, (precision,)),
                (f"{precision} beside float32", correctness.autocast, (precision,)),
            ]
        found += [
            ("resumed, deterministic", correctness.resuming, (self.precision,)),
            ("AdamW in the backward pass", correctness.in_backward, (self.precision,)),
            ("compiled", correctness.compiled, (self.compile,)),
            ("DDP of one process", correctness.one_process_group, ()),
            ("waits of a step for the GPU", correctness.synchronizations, ()),
        ]
        return [
            Piece("checks", name, _checked, (function, self.small, self.device, more))
            for name, function, more in found
        ]

    def _trainings(self, batch: int, switches: Mapping[str, str]) -> list[Piece]:
        """Return a step of ours, theirs, and ours with each switch."""
        overrides = [
            *self._sizes(),
            f"data.params.batch_size={batch}",
            f"lightning.trainer.precision={self.precision}",
        ]
        given = [f"{name}: {changes}" for name, changes in switches.items()]
        made = training_rows([self.base], overrides, given, self.theirs, self.training)
        group = f"training, {batch} + {batch}"
        return [
            Piece(group, r.name, r.function, r.arguments, r.images, r.dtype, r.environment)
            for r in made
        ]

    def _profiles(self) -> list[Piece]:
        """Return a step of each profile, with the memory that was predicted for it."""
        sizes = self._sizes()
        return [
            Piece("profiles", path.stem, _profiled, ([self.base, path], sizes, self.training), 2)
            for path in self.profiles
        ]

    def _sizes(self) -> list[str]:
        if self.size is None:
            return []
        return [f"data.params.{name}.params.size={self.size}" for name in ("train", "reg")]

    def _samplings(self) -> list[Piece]:
        dtypes = ("fp16", "bf16") if self.device == CUDA else ("fp32",)
        found = []
        for dtype in dtypes:
            for batch in self.batches:
                settings = replace(self.sampling, batch=batch, dtype=dtype)
                programs = [(kind, kind, settings) for kind in (*self.theirs, OURS)]
                if self.device == CUDA:
                    programs.append((f"{OURS}, compiled", OURS, replace(settings, compile=True)))
                for name, kind, asked in programs:
                    group = f"sampling, {dtype}, batch {batch}"
                    arguments = (kind, self.folder, self.base, asked)
                    found.append(Piece(group, name, _sampled, arguments, batch, dtype))
        return found


SWITCHES = {
    "latents not cached": "data.params.latent_cache=false",
    "AdamW behind the backward pass": "model.params.optimizer=adamw",
    "attention recomputed": f"{UNET}.use_checkpoint=attention",
    "all recomputed": f"{UNET}.use_checkpoint=true",
    "channels last": f"{UNET}.channels_last=true",
    "compiled": f"{UNET}.compile=true",
}
LARGE_SWITCHES = {
    "channels last": f"{UNET}.channels_last=true",
    "compiled, channels last": f"{UNET}.compile=true {UNET}.channels_last=true",
}

# What to expect of an H100 before it has measured anything: of group and row, a sentence. Where a
# figure is far from it, something is wrong with the code or with the expectation; say which.
EXPECTED: dict[str, str] = {
    "training, 1 + 1": "15 steps/s or more (25 would be good), 2 x diffusers or more. AdamW reads "
    "and writes about 28 bytes for each of a billion weights, so that no more than 33 % of the "
    "peak, 67 steps/s, can be reached",
    "training, 8 + 8": "28 % of the peak or more, 113 images/s; 40 % would be good",
    "profiles": "the peak within 10 % of what was predicted, and below the card's size",
    "checks": "all pass; a step that waits for the GPU more than twice loses the head start of "
    "the processor",
}


def _checked(
    function: Callable[..., correctness.Found],
    small: Mapping[str, object],
    device: str,
    more: tuple[object, ...],
) -> correctness.Found:
    with tempfile.TemporaryDirectory(prefix="gpu_day") as folder:
        return function(correctness.World(small, device, Path(folder)), *more)


def _profiled(base: Sequence[Path], overrides: Sequence[str], settings: Settings) -> dict[str, Any]:
    config = checked_config(base, overrides)
    ((predicted, _),) = predict(config, [(settings.device, None)])
    return {"predicted_bytes": predicted.total, **measure_training(OURS, config, settings)}


def _sampled(kind: str, folder: Path, config: Path, settings: sample.Settings) -> dict[str, Any]:
    """Draw from random weights, which the first piece that needs them writes."""
    weights = folder / f"random-{settings.dtype}.safetensors"
    if kind == OURS and not weights.exists():
        random_weights(config, weights, settings.dtype)
    return sample.measure_sampling(kind, config, weights, settings)


def run(day: Day, minutes: float) -> int:
    """Run the pieces that are not there yet, until the time is over; return how many are left."""
    started = time.monotonic()
    pieces = day.pieces()
    left = [piece for piece in pieces if not _is_done(day.folder, piece)]
    for number, piece in enumerate(left):
        if time.monotonic() - started > 60 * minutes:
            return len(left) - number
        log.info("%s: %s (%d of %d)", piece.group, piece.name, number + 1, len(left))
        _keep(day.folder / "pieces" / piece.file, _measured(day, piece))
    for weights in day.folder.glob("random-*.safetensors"):
        weights.unlink()
    return 0


def _measured(day: Day, piece: Piece) -> dict[str, Any]:
    """Return what a piece finds, or why it fails."""
    started = time.monotonic()
    try:
        found = rows.in_own_process(piece.function, *piece.arguments, environment=piece.environment)
    except Exception as error:  # whatever it is, the other pieces can still say something
        log.warning("%s: %s failed: %s", piece.group, piece.name, first_line(error))
        found = {"failed": first_line(error)}
    return {**found, "took_seconds": time.monotonic() - started, "images": piece.images}


def _keep(path: Path, found: Mapping[str, object]) -> None:
    content = json.dumps(found, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(content))


def _kept(folder: Path, piece: Piece) -> dict[str, Any]:
    """Return what a piece has left; nothing where it has not run."""
    try:
        return json.loads((folder / "pieces" / piece.file).read_text())
    except FileNotFoundError:
        return {}


def _is_done(folder: Path, piece: Piece) -> bool:
    """Return whether a piece need not run again: memory that ends is an answer, too."""
    found = _kept(folder, piece)
    return bool(found) and found.get("failed") in (None, "out of memory")


def summarize(day: Day) -> tuple[dict[str, Any], str]:
    """Return all that was found so far, and the tables of it in Markdown."""
    dtypes = {piece.dtype for piece in day.pieces() if piece.images}
    threads = day.training.threads
    rates = {dtype: _rate(day, dtype, threads) for dtype in sorted(dtypes)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for piece in day.pieces():
        if found := _kept(day.folder, piece):
            row = {"name": piece.name, **found}
            if piece.images:
                row |= report.figures(found, piece.images, rates[piece.dtype])
            groups.setdefault(piece.group, []).append(row)
    facts = {**machine(day.device), "matmul_flops_per_second": rates}
    tables = [_heading(facts)]
    for group, found_rows in groups.items():
        tables.append(f"**{group}.** Expected: {EXPECTED.get(group, 'faster than diffusers')}.")
        tables.append(_table(group, found_rows))
    return {"machine": facts, "expected": EXPECTED, "groups": groups}, "\n\n".join(tables) + "\n"


def _rate(day: Day, dtype: str, threads: int) -> float:
    """Return the rate of a matrix product on the device, measured once."""
    path = day.folder / "pieces" / f"rate-{dtype}.json"
    if not path.exists():
        rate = rows.in_own_process(rows.matmul_rate, day.device, dtype, threads, "wall")
        _keep(path, {"rate": rate})
    return json.loads(path.read_text())["rate"]


def _heading(facts: Mapping[str, Any]) -> str:
    where = facts.get("gpu") or facts["cpu"]
    rates = facts["matmul_flops_per_second"].items()
    listed = ", ".join(f"{dtype} {rate / report.TERA:.3g}" for dtype, rate in rates)
    versions = f"torch {facts['torch']}, diffusers {facts.get('diffusers', 'not installed')}"
    return f"{where}; {versions}; TFLOP/s of a matrix product: {listed}"


def _table(group: str, found: list[dict[str, Any]]) -> str:
    if group == "checks":
        lines = ["| | found | |", "| --- | --- | --- |"]
        for row in found:
            verdict = "" if row.get("passes") else "**no**"
            text = row.get("found") or row["failed"]
            lines.append(f"| {row['name']} | {text} | {verdict} |")
        return "\n".join(lines)
    compared_to = found[0]["name"]
    report.compare(found, compared_to)
    text = report.table(found, compared_to)
    if group != "profiles":
        return text
    predicted = [
        f"{row['name']} {row['predicted_bytes'] / report.GB:.2f} GB"
        for row in found
        if "predicted_bytes" in row
    ]
    return f"{text}\n\nPredicted: {', '.join(predicted)}."


BEGIN, END = "<!-- gpu_day: begin -->", "<!-- gpu_day: end -->"


def put_into(document: Path, tables: str) -> None:
    """Replace what stands between two marks of a document by the tables.

    Raises:
        UserError: the document has no such marks.
    """
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{document}: has no lines {BEGIN} and {END} to write the tables between")
    content = f"{before}{begin}\n\n{tables}\n{end}{after}"
    write_atomically(document, lambda path: path.write_text(content))


REHEARSED = [
    "data.params.train.params.size=16",
    "data.params.reg.params.size=16",
    "data.params.batch_size=1",
    "data.params.latent_cache=null",
    f"{UNET}.model_channels=32",
    f"{UNET}.channel_mult=[1]",
    f"{UNET}.attention_resolutions=[1]",
    "model.params.first_stage_config.params.ddconfig.ch_mult=[1, 2]",
    "model.params.image_size=8",
    "model.params.cond_stage_config.params.text_config.num_hidden_layers=1",
]


def whole_day(configs: Path, folder: Path, size: int | None) -> Day:
    """Return what a GPU is to say of Stable Diffusion v1.

    Args:
        configs: the project's folder of them.
    """
    profiles = configs / "stable-diffusion" / "profiles"
    threads = torch.get_num_threads()
    return Day(
        base=configs / "stable-diffusion" / "v1-finetune_unfrozen.yaml",
        profiles=[profiles / f"{card}gb.yaml" for card in (24, 16, 12, 8)],
        small=checked_config([configs / "tiny" / "dreambooth.yaml"], []),
        device=CUDA,
        folder=folder,
        size=size,
        training=Settings(steps=10, warmup=3, device=CUDA, threads=threads),
        sampling=sample.Settings(steps=50, size=size, device=CUDA, threads=threads),
        theirs=_theirs(),
    )


def rehearsal(configs: Path, folder: Path) -> Day:
    """Return the same pieces at a size that a processor does in a moment, to see that they run."""
    small = checked_config([configs / "tiny" / "dreambooth.yaml"], REHEARSED)
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(small, folder / "small.yaml")
    save_yaml({"model": {"params": {"optimizer": "adamw"}}}, folder / "profile.yaml")
    threads = torch.get_num_threads()
    return Day(
        base=folder / "small.yaml",
        profiles=[folder / "profile.yaml"],
        small=small,
        device="cpu",
        folder=folder,
        batches=(1, 2),
        training=Settings(steps=1, warmup=0, threads=threads),
        sampling=sample.Settings(steps=1, size=16, threads=threads),
        compile={"backend": "eager"},
        theirs=_theirs(),
    )


def _theirs() -> list[str]:
    return ["diffusers"] if importlib.util.find_spec("diffusers") else []
