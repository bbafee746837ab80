"""The report in a real browser: it loads alone, shows every picture, and fits a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from helpers.run_folders import CONFIG, make_run, write
from var_exp.report import write_comparison, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed, none of {', '.join(BROWSERS)}")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["finished", "young", "compared"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of each kind, with names as long as names can be."""
    folder = tmp_path_factory.mktemp(request.param) / ("a_run_with_quite_a_long_name_" * 4)
    write(folder / "young" / ".hydra" / "config.yaml", CONFIG)
    write(folder / "young" / ".hydra" / "overrides.yaml", f"- data.root=/{'x' * 300}\n")
    if request.param == "young":
        return write_report(folder / "young")
    finished = make_run(folder / "finished", {f"var/{'long_' * 30}": 1.0})
    if request.param == "finished":
        return write_report(finished)
    other = make_run(folder / "other", {"var/loss": 4.2}, cfg_scale=3.0)
    return write_comparison([finished, other, folder / "young"], folder / "compare.html")


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    yield page
    page.close()


def test_it_loads_without_errors_or_requests_and_nothing_is_wider_than_the_window(page, page_file):
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window
    widths = page.evaluate("Array.from(document.images, image => image.naturalWidth)")
    assert all(width > 0 for width in widths)
    assert len(widths) == {"young": 0, "finished": 5, "compare": 4}[_kind(page_file)]


def test_charts_are_drawn_in_the_colours_of_the_page(page, page_file):
    page.goto(page_file.as_uri())
    sizes = page.evaluate(
        "Array.from(document.querySelectorAll('svg.chart'), s => s.getBoundingClientRect().width)"
    )
    assert all(250 < size < 400 for size in sizes)
    assert bool(sizes) == (_kind(page_file) != "young")
    strokes = page.evaluate(
        """Array.from(document.querySelectorAll('svg.chart path'),
                      path => getComputedStyle(path).stroke)"""
    )
    accent = page.evaluate("getComputedStyle(document.querySelector('a, .mark')).color")
    assert "rgb(0, 0, 0)" not in strokes
    if _kind(page_file) == "finished":
        assert accent in strokes


def _kind(page_file: Path) -> str:
    return "compare" if page_file.stem == "compare" else page_file.parent.name
