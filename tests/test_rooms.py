"""The rooms of `ldm/` import each other in one direction, and some things stand in none of them.

A room is a folder of `ldm/`; the files beside the folders are the ground floor. Imports are read
from the sources, inside of functions too: a late import that hides a climb is a wall in the wrong
place. Only what a type checker alone sees (`if TYPE_CHECKING:`) does not count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ldm

ROOT = Path(ldm.__file__).parent.parent
FILES = sorted((ROOT / "ldm").rglob("*.py"))
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}

# From the ground up: a room imports itself and those before it, so that there is no circle.
GROUND = "the ground floor"
ROOMS = (
    GROUND, "modules", "optim", "models", "data", "checkpoints", "sampling", "evaluation", "reports", "tiny",
    "callbacks", "training", "studies", "benchmark",
)  # fmt: skip


class Import(NamedTuple):
    """An import of one of our modules, where it stands."""

    file: str
    line: int
    module: str

    @property
    def climbs(self) -> bool:
        start = room(self.file.removesuffix(".py").replace("/", "."))
        return ROOMS.index(start) < ROOMS.index(room(self.module))

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def room(module: str) -> str:
    """Return the folder of `ldm/` in which a module is."""
    parts = module.split(".")
    in_a_folder = len(parts) > 1 and (ROOT / "ldm" / parts[1]).is_dir()
    return parts[1] if in_a_folder else GROUND


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and every one in it, at any depth, but for what only a type checker sees."""
    yield node
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if for_types else ast.iter_child_nodes(node):
        yield from statements(child)


def modules(node: ast.AST, package: str) -> list[str]:
    """Return the modules that a statement imports, by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *base.split(".")]).strip(".")
        inner = [f"{base}.{alias.name}" for alias in node.names]
        return [name if is_module(name) else base for name in inner]
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
        and node.args
    ):
        name = node.args[0]
        return (
            [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
        )
    return []


def imports(sources: dict[str, str], ours: tuple[str, ...] = ("ldm",)) -> list[Import]:
    """Find every import of our packages."""
    found = []
    for file, source in sources.items():
        package = file.rpartition("/")[0].replace("/", ".")
        for node in statements(ast.parse(source)):
            names = dict.fromkeys(modules(node, package))
            found += [
                Import(file, node.lineno, name) for name in names if name.split(".")[0] in ours
            ]
    return found


def climbs(sources: dict[str, str]) -> list[Import]:
    return [item for item in imports(sources) if item.climbs]


def test_rooms_import_each_other_in_one_direction():
    found = [str(item) for item in climbs(SOURCES)]
    assert not found, "\n".join(["imports that climb from room to room:", *found])


def test_every_room_has_its_place_in_the_order():
    folders = {path.name for path in (ROOT / "ldm").iterdir() if list(path.glob("*.py"))}
    assert folders == set(ROOMS) - {GROUND}


def test_nothing_in_the_library_imports_what_uses_it():
    assert imports(SOURCES, ("main", "scripts", "tests")) == []


def test_scripts_of_studies_can_be_run_as_files():
    """Python puts a script's own folder in the project's place, where no package `scripts` is."""
    names = [
        f"scripts/{name}.py" for name in ("dreambench", "evaluate", "replay", "report", "sweep")
    ]
    assert imports({name: (ROOT / name).read_text() for name in names}, ("scripts", "tests")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ldm.training.cli import parse",
        "import ldm.training.cli",
        "from ldm.training import cli",
        "from ..training import cli",
        "from .. import training",
        "def late():\n    from ldm.training.cli import parse",
        "class A:\n    def late(self):\n        if self:\n            import ldm.training.cli as c",
        "import importlib\nimportlib.import_module('ldm.training.cli')",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import ldm.training",
    ],
)
def test_an_import_that_climbs_is_named(source):
    (found,) = climbs(
        {"ldm/models/a.py": source, "ldm/training/b.py": "import ldm.models, ldm.util"}
    )
    line = len(source.splitlines())
    assert str(found).startswith(f"ldm/models/a.py:{line} imports ldm.training")


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ldm.training import cli",
        "from ldm.models.diffusion import ddpm",
        "from ldm.util import default",
        "from .diffusion import ddpm",
        "import os, torch",
    ],
)
def test_other_imports_do_not_climb(source):
    assert climbs({"ldm/models/a.py": source}) == []


# What stands nowhere in the library


def offences(source: str) -> list[tuple[int, str]]:
    """Find `print`, the literal "cuda" and handlers that catch everything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            found.append((node.lineno, "print: use logging"))
        literal = node.value if isinstance(node, ast.Constant) else None
        if isinstance(literal, str) and literal.partition(":")[0] == "cuda":
            found.append(
                (
                    node.lineno,
                    f"{literal!r}: compare with ldm.host.CUDA, or ask what the machine has",
                )
            )
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "a bare except: name what is caught"))
    return found


def test_what_stands_nowhere_in_the_library():
    found = [
        f"{file}:{line}: {what}"
        for file, source in SOURCES.items()
        for line, what in offences(source)
        if not (file == "ldm/host.py" and what.startswith("'cuda'"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ["print('x')", "device = 'cuda'", "x.to('cuda:0')", "try:\n    x()\nexcept:\n    pass"],
)
def test_what_hygiene_finds(source):
    assert len(offences(source)) == 1
