"""The pages as a browser shows them, with every request that would leave the machine refused.

Needs Debian's `chromium` and `pip install playwright`.
"""

import json
import shutil

import pytest
from PIL import Image

from ldm.evaluation.protocols import find_protocol
from ldm.evaluation.scores import Scored
from ldm.reports.protocols import protocol_page
from ldm.reports.runs import SUMMARY, read_run, run_page
from ldm.reports.sweeps import sweep_page

CHROMIUM = shutil.which("chromium")
NARROW, WIDE = 420, 1200  # pixels of a window


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def a_run(folder):
    """A run's folder, as far as its page reads it."""
    (folder / "csv/one").mkdir(parents=True)
    (folder / "images/panel").mkdir(parents=True)
    rows = [f"{step},{0.3 - step / 100},{0.2 + step / 100},{0.25}" for step in range(0, 9, 4)]
    head = "step,val/loss_subject_fixed,val/loss_prior_fixed,train/loss"
    (folder / "csv/one/metrics.csv").write_text("\n".join([head, *rows]))
    for step in (0, 8):
        Image.new("RGB", (130, 320), "gray").save(folder / f"images/panel/panel_gs-{step:06}.png")
    (folder / SUMMARY).write_text(json.dumps({"status": "finished", "step": 8, "steps": 8}))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of a run, of a sweep of twelve trials, and of a protocol."""
    folder = tmp_path_factory.mktemp("pages")
    run = a_run(folder / "a-run")
    trials = [f"{number:03}" for number in range(12)]
    rows = [
        {
            "trial": trial,
            "model.base_learning_rate": 1e-5 * number,
            "model.params.reg_weight": 0.5,
            "status": "done",
            "val/loss_subject_fixed": 0.1 + number / 100,
            "val/loss_prior_fixed": 0.3 - number / 100,
            "train/loss": 0.2,
            "train/loss_simple": 0.2,
        }
        for number, trial in enumerate(trials)
    ]
    scored = Scored("paper", {"DINO": "0" * 12})
    for subject in ("a", "b"):
        scored.rows.append({"subject": subject, "seed": "1", "DINO": 0.5, "DIV": 0.7})
    sheet = folder / "sheet.png"
    Image.effect_noise((900, 500), 60).save(sheet)
    protocol = find_protocol("paper")
    found = {
        "run": run_page(read_run(run)),
        "sweep": sweep_page("twelve", rows, dict.fromkeys(trials, run)),
        "protocol": protocol_page("P", {"lora": scored}, protocol, [("lora", sheet)], {"a": 1}),
    }
    for name, page in found.items():
        page.save(folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("name", ["run", "sweep", "protocol"])
def test_a_page_asks_for_nothing_and_fits_the_window(browser, pages, name, width):
    tried, said = [], []

    def refuse(route):
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
            return
        tried.append(route.request.url)
        route.abort()

    page = browser.new_page(viewport={"width": width, "height": 900})
    page.route("**/*", refuse)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"file://{pages / name}.html", wait_until="load")
    assert tried == [] and said == []
    # Every picture is shown and says in words what it shows.
    shown = page.evaluate(
        "[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0, i.width])"
    )
    assert shown and all(alt and there for alt, there, _ in shown)
    assert max(pixels for _, _, pixels in shown) <= width
    # What is wider than the window scrolls for itself.
    wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wider) == 0
    page.close()
