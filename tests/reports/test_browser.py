"""The report in a browser at desktop and phone widths, light and dark: layout, accessibility and visible content."""

import shutil

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from evaluations import safety, write
from labelled import label, write_labelled, write_odds
from playwright.sync_api import sync_playwright

from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report

FIRST_SCREEN = {1400: 900, 390: 1_700}  # width -> the height within which the result is stated, in pixels
SCREENS = 6
WIDER = """() => [...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest('details:not([open]) > :not(summary)') || element.closest('thead')) return false;
    return box.right > innerWidth + 1 || box.left < -1
        || (element.matches('.scroll') && element.scrollWidth > element.clientWidth + 1);
}).map(element => element.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of all there is, one of evaluations alone, and one of groups and other runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for seed, (name, right) in enumerate((("original", 0.4), ("sft", 0.8), ("ppo", 0.95))):
        truth = write_labelled(folder / name, right, images=2, seed=seed)
        label(folder / name, truth)
        write_odds(folder / name, seed)
        write(folder / name / "evaluation", safety(np.random.default_rng(seed), right))
        runs.append(folder / name)
    for seed, name in enumerate(("kto-0", "kto-1", "kto-2", "dpo-0", "dpo-1"), len(runs)):
        write_labelled(folder / name, 0.8, images=2, seed=seed)
    return [
        report(runs, folder / "report.html"),
        evaluation(runs, folder / "evaluation.html"),
        report(runs[:2], folder / "groups.html", group=[f"{name}={folder}/{name}-*" for name in ("kto", "dpo")]),
    ]


@pytest.fixture(scope="module")
def browser():
    found = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    assert found, "no chromium: install Debian's (apt-get install chromium); the report is tested in a browser"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", FIRST_SCREEN)
def test_the_page_in_a_browser(width, scheme, browser, pages):
    for file in pages:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        requests = []
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.goto(file.as_uri())
        assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]

        for seen in (".headline", ".tile", "#plot-forest"):
            boxes = [each.bounding_box() for each in page.locator(seen).all()]
            assert boxes, seen
            assert all(box["y"] + box["height"] <= FIRST_SCREEN[width] for box in boxes), (seen, boxes)
        assert page.locator(".tile").count() == 4
        if width == 1400:
            assert page.evaluate("document.documentElement.scrollHeight") <= SCREENS * 900
        if file.stem == "report":  # gaps and categories, as there are curves and evaluations, too
            assert page.locator("summary", has_text="Single runs").count() == 2

        for plot in page.locator("svg[role=img]").all():
            named = plot.get_attribute("aria-labelledby").split()
            assert all(plot.locator(f"#{name}").text_content().strip() for name in named)
        for _ in range(2):  # as opened, and with everything unfolded
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(WIDER) == []
            found = Axe().run(page).response["violations"]
            assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        context.close()


@pytest.mark.slow
def test_many_runs_fit_a_phone(browser, tmp_path):
    runs = [tmp_path / (f"ppo-with-a-long-name-{seed}" if seed else "original") for seed in range(9)]
    for seed, run in enumerate(runs):
        write_labelled(run, 0.4 if seed == 0 else 0.8, concepts=10, images=1, seed=seed)
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(report(runs, tmp_path / "report.html").as_uri())
    for _ in range(2):  # as opened, and with everything unfolded
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(WIDER) == []
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert all(each.bounding_box()["height"] < 250 for each in page.locator(".headline").all())
    # No two runs have the same mark and colour.
    keys = page.evaluate("[...document.querySelectorAll('#plot-forest .key svg')].map(each => each.outerHTML)")
    assert len({*keys}) == len(keys) == 8
