"""What pyproject.toml cannot say: a wheel brings along the files that a checkout has beside `ldm/`.

`ldm.config.PROJECT` finds them in either place.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("main.py", "configs", "scripts", "models/tiny")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "sprites", "cache")


class BuildWithProject(build_py):
    """Copies the shipped files into the package, unless it is installed in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        here, target = Path(__file__).resolve().parent, Path(self.build_lib, "ldm", "project")
        for name in SHIPPED:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (here / name).is_dir():
                shutil.copytree(here / name, target / name, ignore=LEFT_OUT, dirs_exist_ok=True)
            else:
                shutil.copyfile(here / name, target / name)


setup(cmdclass={"build_py": BuildWithProject})
