"""The configs that a run's starts have saved, and where the files that they name are now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import PATHS, RunConfig, load_config, to_plain
from ldm.training.run import Run


def saved_config(run: Run) -> RunConfig:
    """Return the config of a run's latest start: those of all its starts, merged in their order."""
    return _read(run, run.saved_configs())


def first_config(run: Run) -> RunConfig:
    """Return the config of a run's first start."""
    paths = run.saved_configs()
    stamp = paths[0].name.rpartition("-")[0]
    return _read(run, [path for path in paths if path.name.rpartition("-")[0] == stamp])


def _read(run: Run, paths: list[Path]) -> RunConfig:
    return with_files_found(RunConfig(to_plain(load_config(paths))), run.folder)


def with_files_found(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run's config with the files and folders that it names where they are now.

    Args:
        folder: of the run.
    """
    # A relative path is one from where the run was started; a workspace may have moved as a whole.
    folders = [Path.cwd(), folder.resolve().parent.parent]
    started = config.get("run.working_folder")
    if started is not None:
        folders.insert(0, Path(started))
    return RunConfig(_found(config.content, folders))


def _found(value: object, folders: list[Path], key: str = "") -> Any:
    """Return nested containers in which relative paths that are elsewhere are absolute."""
    if isinstance(value, Mapping):
        return {name: _found(inner, folders, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_found(inner, folders, key) for inner in value]
    if key not in PATHS or not isinstance(value, str) or Path(value).expanduser().is_absolute():
        return value
    for folder in folders:
        if (folder / value).exists():
            return value if folder == Path.cwd() else str(folder / value)
    return value
