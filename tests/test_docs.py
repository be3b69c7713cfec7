"""README and docs: their Python runs, and what they point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ldm.config import check_config
from ldm.training import cli
from ldm.training.defaults import TRAINER_KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/*.md")]
    if page.is_file()
)
PATH = re.compile(r"(?:ldm|configs|scripts|docs|tests|models/tiny)/[\w./-]*[\w/]")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {path for code in re.findall(r"`([^`\n]+)`", text) for path in PATH.findall(code)}
    made_by_a_run = re.compile(r"models/tiny/(sprites|cache)|models/ldm")
    missing = [
        path for path in named if not made_by_a_run.match(path) and not (ROOT / path).exists()
    ]
    assert not missing, f"{page.name} names {missing}"


def ablations():
    """Return the overrides of the guide's table of ablations, and the command that they go into."""
    section = (
        (ROOT / "docs/guide.md").read_text(encoding="utf-8").split("## The paper's ablations")[1]
    )
    command = re.search(r"python main.py (.*?) OVERRIDE", section, re.DOTALL)[1].replace(
        "\\\n", " "
    )
    overrides = re.findall(r"(?m)^\| [^|]+ \| `(.*)` \|$", section)
    return command, overrides


def test_the_guides_ablations_are_commands_that_are_accepted(tmp_path):
    command, overrides = ablations()
    assert len(overrides) == 14
    counts = {int(override.partition("num_images=")[2] or 0) for override in overrides}
    assert counts == {0, *range(1, 6), 8, 100, 200, 1000}
    for override in overrides:
        args = cli.parse_args(shlex.split(f"{command} {override} --logdir {tmp_path}"))
        config, _ = cli.prepare(args)
        check_config(config.content, TRAINER_KEYS)
        for word in shlex.split(override):
            key, is_key, value = word.partition("=")
            assert not is_key or str(config.get(key)).lower() == value


def test_python_examples_run(tmp_path, monkeypatch):
    """Run the blocks of docs/python.md one after another, then the README's own."""
    monkeypatch.chdir(ROOT)
    for page in (ROOT / "docs/python.md", ROOT / "README.md"):
        names = {}
        for block in re.findall(
            r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            block = block.replace('save("car.png")', f'save("{tmp_path}/readme.png")')
            exec(block.replace("outputs/python", str(tmp_path)), names)
        assert (tmp_path / ("readme.png" if page.name == "README.md" else "car.png")).exists()
        if page.name == "python.md":
            assert names["cond"].shape == (2, 77, 128)
            assert names["pixels"].shape == (2, 3, 64, 64)
            assert names["latents"].shape == (2, 4, 16, 16)
            assert names["status"] == 0
            assert list((tmp_path / "logs").glob("*/checkpoints/last.ckpt"))
