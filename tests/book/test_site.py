"""The book is built for the tiny preset by the Snakefile that readers use, and opened in a real browser."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

PROJECT = Path(__file__).resolve().parents[2]
SITE = PROJECT / "book" / "executed" / "tiny" / "_build" / "html"
PAGES = [str(page) for page in parse_toc_yaml(PROJECT / "_toc.yml")]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
WITHOUT_CODE = """main => {
    const copy = main.cloneNode(true);
    copy.querySelectorAll("code, pre").forEach(part => part.remove());
    return copy.textContent;
}"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def site():
    """The built site: only what changed since the last time is made again."""
    snakemake = Path(sys.executable).with_name("snakemake")
    done = subprocess.run(
        [snakemake, "--cores", "all", "--config", "preset=tiny"],
        cwd=PROJECT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return SITE


@pytest.fixture(scope="session")
def browser(site):
    """Debian's Chromium; nothing is fetched from the network."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so the pages are not opened in a browser")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(site, browser):
    """Opens a page of the book by its name in the table of contents."""
    context = browser.new_context(offline=True)
    page = context.new_page()

    def open_page(name):
        page.goto((site / f"{name}.html").as_uri(), wait_until="load")
        return page

    yield open_page
    context.close()


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_every_page_of_the_table_of_contents_is_there(site, name):
    assert (site / f"{name}.html").stat().st_size > 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_its_heading_and_nothing_unresolved(opened, name):
    page = opened(name)
    assert page.locator("h1").first.inner_text().strip()
    assert page.locator(".problematic, .system-message, .error").count() == 0
    text = page.locator("main").first.evaluate(WITHOUT_CODE)  # the reference pages write roles as code
    assert "??" not in page.locator("main a").all_inner_texts()
    assert not any(role in text for role in ("{glue", "{doc}", "{cite", "{numref}", "{eq}", "{download}"))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_within_the_book_leads_somewhere(opened, name):
    page = opened(name)
    targets = page.eval_on_selector_all("main a[href]", "links => links.map(link => link.href)")
    for target in {target.split("#")[0].split("?")[0] for target in targets if target.startswith("file:")}:
        assert Path(target.removeprefix("file://").replace("%20", " ")).exists(), target


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_figures_of_a_chapter_show(opened, name):
    page = opened(name)
    figures = page.locator("main .cell_output img")
    assert figures.count() > 0
    widths = figures.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert all(width > 0 for width in widths)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_hidden_solution_opens_when_clicked(opened, name):
    page = opened(name)
    solution = page.locator(".tag_solution details").first
    assert solution.get_attribute("open") is None
    solution.locator("summary").first.click()
    assert solution.get_attribute("open") is not None
    assert solution.locator("summary ~ *").first.is_visible()


@pytest.mark.parametrize("name", CHAPTERS)
def test_formulas_are_set_without_a_network(opened, name):
    page = opened(name)
    page.wait_for_selector("mjx-container", timeout=10_000)
    assert page.locator("mjx-container").count() >= page.locator("main .math").count() > 0
