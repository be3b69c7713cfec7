"""A grid of pictures in which two flags vary: `--x scale=4,7.5,12 --y ckpt=a.ckpt,b.ckpt`."""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError, nearest
from ldm.sampling.contact_sheet import contact_sheet
from ldm.sampling.flags import check_recipe_flags
from ldm.sampling.like import FLAG_OF, axis_name
from ldm.sampling.seeds import chosen_seed
from ldm.sampling.text_to_image import Recipe

SMALLEST = 128  # side of a cell of the sheet, so that there is room for words above small pictures


@dataclass(frozen=True)
class Axis:
    """A flag and the values that it takes along one side of the grid.

    Attributes:
        flag: where the parsed flags keep its value.
    """

    name: str
    flag: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """Return what stands beside a row, or above a column."""
        if self.name == "prompt":
            return str(value)
        # Names without folders, unless two checkpoints would look alike.
        if self.name == "ckpt":
            stems = {Path(other).stem for other in self.values}
            value = Path(value).stem if len(stems) == len(self.values) else value
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


NOTHING = Axis("", "", (None,))


def add_grid_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the two axes."""
    add = parser.add_argument_group("grid over two flags").add_argument
    for name in ("x", "y"):
        add(
            f"--{name}",
            metavar="NAME=A,B",
            help="a column for each value" if name == "x" else "a row for each value",
        )


def read_axis(text: str | None, parser: argparse.ArgumentParser) -> Axis:
    """Read `scale=4,7.5,12`; a value with a comma stands in quotation marks.

    Raises:
        UserError: another form, a flag that cannot vary, or a value that the flag cannot have.
    """
    if text is None:
        return NOTHING
    # The name: ours, an older one of ours, or another program's.
    given, _, listed = text.partition("=")
    name = axis_name(given)
    flag = FLAG_OF.get(name, name)
    # What may vary: the recipe's fields and a few others that this command has a flag for.
    actions = {action.dest: action for action in parser._actions if action.nargs is None}
    may_vary = {FLAG_OF.get(f.name, f.name): f.name for f in fields(Recipe)}
    may_vary |= {"H": "H", "W": "W", **{key: key for key in ("prompt", "negative_prompt", "ckpt")}}
    known = sorted(may_vary[key] for key in may_vary if key in actions)
    if name not in known:
        hint = nearest(name, known)
        raise UserError(f"{text}: '{name}' cannot vary{hint}; accepted: {', '.join(known)}")
    # The values: commas separate them, so a prompt with one stands in quotation marks.
    words = next(csv.reader([listed], skipinitialspace=True), [])
    words = [word.strip() for word in words]
    if not all(words) or not words:
        raise UserError(f"{text}: expected values with commas between them, as scale=4,7.5,12")
    # The flag itself knows what its values are.
    action = actions[flag]
    kind: Callable[[str], Any] = action.type if callable(action.type) else str
    try:
        values = tuple(kind(word) for word in words)
    except ValueError as error:
        whole = "a whole number" if kind is int else "a number"
        raise UserError(f"{text}: {name} is {whole}") from error
    # A value twice, if only in other digits, would draw the same picture twice, under one key.
    if len(set(values)) < len(values):
        raise UserError(f"{text}: a value is there twice")
    for value in values:
        if action.choices is not None and value not in action.choices:
            raise UserError(f"{text}: accepted: {', '.join(map(str, action.choices))}")
    return Axis(name, flag, values)


def grid_axes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Axis, Axis]:
    """Return the axes across and down.

    Raises:
        UserError: what `read_axis` refuses, axes that are one, or flags that ask for a series.
    """
    # Each cell is one picture. What asks for more than one has no place in it.
    across, down = read_axis(args.x, parser), read_axis(args.y, parser)
    if across.flag == down.flag:
        raise UserError(f"--x, --y: both are {across.name}")
    for name in ("from_file", "suite"):
        if getattr(args, name, None):
            raise UserError(
                f"--x, --y: draw one picture for each pair of values, of one prompt: leave "
                f"--{name.replace('_', '-')} out, or give --x prompt=..."
            )
    if args.only is not None and len(args.only) > 1:
        raise UserError("--only: a grid over two flags draws one picture of the series")
    return across, down


def cells(
    across: Axis, down: Axis, args: argparse.Namespace
) -> dict[tuple[Any, Any], argparse.Namespace]:
    """Return the flags of each cell, by its values.

    Raises:
        UserError: a cell with a recipe that no model can follow.
    """
    args.seed = chosen_seed(args.seed)  # one for all of them
    for axis in (across, down):
        for value in axis.values:
            if axis.flag == "ckpt" and not Path(value).exists():
                raise UserError(f"{value}: no such checkpoint")
    found = {}
    for below in down.values:
        for beside in across.values:
            cell = copy.copy(args)
            # A cell's flags are those of the command, with its two values.
            for axis, value in ((across, beside), (down, below)):
                if axis.flag:
                    setattr(cell, axis.flag, value)
            # All cells are checked before the first is drawn.
            check_recipe_flags(cell)
            found[beside, below] = cell
    return found


def labelled_grid(
    across: Axis, down: Axis, made: Mapping[tuple[object, object], Image.Image], title: str
) -> Image.Image:
    """Return the pictures in rows and columns, with the values beside them."""
    # One size for all cells, so that rows and columns line up.
    side = max(SMALLEST, *(max(image.size) for image in made.values()))
    rows = []
    for below in down.values:
        entries = [
            (across.label(beside) if across.flag else "", made[beside, below])
            for beside in across.values
        ]
        rows.append((down.label(below) if down.flag else "", entries))
    return contact_sheet(rows, cell=side, title=title)


def by_checkpoint(
    found: Mapping[tuple[object, object], argparse.Namespace],
) -> dict[str, Sequence[tuple[Any, Any]]]:
    """Return the cells of each checkpoint, so that each is loaded once."""
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for values, cell in found.items():
        groups.setdefault(str(cell.ckpt), []).append(values)
    return dict(groups)
