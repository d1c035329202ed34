"""The book is built for the tiny preset by the Snakefile that readers use, and opened in a real browser."""

import functools
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

PROJECT = Path(__file__).resolve().parents[2]
SITE = PROJECT / "book" / "executed" / "tiny" / "_build" / "html"
PAGES = [str(page) for page in parse_toc_yaml(PROJECT / "_toc.yml")]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
CLOSER = [page for page in CHAPTERS if Path(page).name[:2] in ("01", "02", "04")]
"""Chapters with a chart to look closer at."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


DESKTOP, PHONE = 1400, 375
LARGEST_PAGE = 3_000_000  # bytes of a page's HTML and images

FACTS = """() => {
  const main = document.querySelector("main"), all = (selector, from = main) => [...from.querySelectorAll(selector)];
  const folds = all("details").map(fold => {
    const wasOpen = fold.open, solution = !!fold.closest(".tag_solution");
    if (!wasOpen) fold.querySelector("summary").click();
    const content = [...fold.children].filter(child => !["SUMMARY", "STYLE"].includes(child.tagName));
    const shows = content.some(child => child.getBoundingClientRect().height > 0);
    const cell = fold.closest(".cell"), output = cell?.querySelector(":scope > .cell_output");
    const bare = !!cell && cell.classList.contains("tag_hide-input") && !cell.classList.contains("tag_hide-output")
      && !(output?.getBoundingClientRect().height > 0);
    const text = fold.querySelector("summary").innerText.trim();
    return {text, wasOpen, solution, bare, opens: fold.open && shows};
  });
  const cut = all("pre").filter(code => code.scrollWidth > code.clientWidth + 1);
  const scrolling = all("span.math, span.math mjx-container").filter(
    node => ["auto", "scroll"].includes(getComputedStyle(node).overflowX));
  const shown = node => node.getBoundingClientRect().height > 0;
  const idea = main.querySelector("h2");
  const before = all(".cell_input").filter(cell => !cell.closest("details") && idea &&
    cell.compareDocumentPosition(idea) & Node.DOCUMENT_POSITION_FOLLOWING);
  const scrolls = node => node && node !== main &&
    (["auto", "scroll", "hidden"].includes(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  const sticksOut = node => node.getBoundingClientRect().right > innerWidth + 1 && !scrolls(node.parentElement);
  const wide = all("article *").filter(sticksOut);
  const prose = main.cloneNode(true);
  const written = "pre, code, .sig, script, style, .closer, .math, mjx-container, .headerlink";
  all(written, prose).forEach(node => node.remove());
  return {
    folds,
    cut: cut.map(code => code.innerText.slice(0, 200)),
    scrolling: scrolling.length,
    searches: [...document.querySelectorAll(".search-button__button, .search-button-field, form.bd-search")]
      .filter(shown).length,
    before: before.map(cell => cell.innerText.slice(0, 200)),
    head: Object.fromEntries([...document.querySelectorAll("head meta[name], head meta[property]")]
      .map(meta => [meta.getAttribute("name") ?? meta.getAttribute("property"), meta.content])),
    scrollWidth: document.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map(node => node.outerHTML.slice(0, 200)),
    heading: main.querySelector("h1")?.innerText.trim() ?? "",
    text: main.innerText,
    prose: prose.textContent,
    broken: all(".problematic, .system-message, .error").length,
    links: all("a[href]").map(link => ({text: link.innerText, target: link.href})),
    images: all("img").map(image => ({
      alt: image.alt,
      source: image.src,
      drawn: image.naturalWidth,
      width: image.getBoundingClientRect().width,
      column: image.parentElement.closest("div, section, figure, td").clientWidth,
      figure: !!image.closest(".cell_output"),
    })),
    outputs: all(".cell_output pre").map(block => block.innerText),
    formulas: all(".math").length,
    set: all("mjx-container").length,
  };
}"""

UNREADABLE = """() => {
  const numbers = colour => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = node => node
    ? over(numbers(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  document.querySelectorAll("main details").forEach(fold => { fold.open = true; });
  return [...document.querySelectorAll("main :is(p, li, td, th, dt, dd, h1, h2, h3, summary, label, .token)")]
    .filter(node => node.innerText.trim() && node.getBoundingClientRect().height > 0)
    .map(node => {
      const ground = behind(node), ink = over(numbers(getComputedStyle(node).color), ground);
      const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
      return {ratio: (high + 0.05) / (low + 0.05), node: node.outerHTML.slice(0, 160)};
    })
    .filter(found => found.ratio < 4.5);
}"""


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


@pytest.fixture(scope="session")
def seen(site, browser):
    """What a page of the book shows at a width; each is visited once, with every fold opened."""

    @functools.cache
    def visit(name, width):
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
        page = context.new_page()
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((site / f"{name}.html").as_uri(), wait_until="load")
        if page.locator("main .math").count():
            page.wait_for_selector("mjx-container", state="attached", timeout=10_000)
        facts = page.evaluate(FACTS)
        context.close()
        return {**facts, "errors": errors}

    return visit


@pytest.fixture
def opened(site, browser):
    """Opens a page of the book by its name in the table of contents, in a browser's context with given options."""
    contexts = []

    def open_page(name, **options):
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.goto((site / f"{name}.html").as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_every_page_of_the_table_of_contents_is_there(site, name):
    assert (site / f"{name}.html").stat().st_size > 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_its_heading_and_nothing_unresolved(seen, name):
    page = seen(name, DESKTOP)
    assert page["heading"]
    assert page["broken"] == 0
    assert "??" not in [link["text"] for link in page["links"]]
    assert not any(role in page["prose"] for role in ("{glue", "{doc}", "{cite", "{numref}", "{eq}", "{download}"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_no_raw_markup(seen, name):
    """Outside code, where such signs are meant."""
    prose = seen(name, DESKTOP)["prose"]
    assert re.findall(r".{0,30}(?:\*\*|\$[^$\n]+\$|:::|\{\w+\}`|</?\w+>|<details|\.\./|\\begin\{).{0,30}", prose) == []


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_makes_no_error_in_the_browser(seen, name, width):
    assert seen(name, width)["errors"] == []


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_no_wider_than_the_screen_even_with_every_fold_open(seen, name, width):
    page = seen(name, width)
    assert page["wide"] == []
    assert page["scrollWidth"] <= width


@pytest.mark.parametrize("name", PAGES)
def test_every_link_within_the_book_leads_somewhere(seen, name):
    targets = {link["target"].split("#")[0].split("?")[0] for link in seen(name, DESKTOP)["links"]}
    for target in {target for target in targets if target.startswith("file:")}:
        assert Path(target.removeprefix("file://").replace("%20", " ")).exists(), target


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_figures_of_a_chapter_show_whole_and_say_in_words_what_they_show(seen, name):
    for width in (DESKTOP, PHONE):
        figures = [image for image in seen(name, width)["images"] if image["figure"]]
        assert figures
        for image in figures:
            assert image["drawn"] > 0
            assert width == PHONE or image["width"] <= image["column"] + 1
            assert len(image["alt"].split()) >= 8, "its file's name is not an alternative text"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_figure_with_several_panels_scrolls_on_a_phone_instead_of_shrinking(seen, name):
    for image in seen(name, PHONE)["images"]:
        if image["figure"]:
            assert image["width"] >= min(image["drawn"], 680) - 1


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_no_formula_within_a_line_has_a_scroll_bar(seen, name, width):
    assert seen(name, width)["scrolling"] == 0


@pytest.mark.parametrize("name", PAGES)
def test_no_code_is_cut_at_the_right(seen, name):
    """With every fold open."""
    assert seen(name, DESKTOP)["cut"] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_one_search_box(seen, name):
    assert seen(name, DESKTOP)["searches"] == 1


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_code_is_open_before_the_first_idea(seen, name):
    assert seen(name, DESKTOP)["before"] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_fold_hides_the_code_of_nothing(seen, name):
    """The code of a figure is folded above it; a fold without anything below has to say what is in it."""
    bare = [fold["text"] for fold in seen(name, DESKTOP)["folds"] if fold["bare"]]
    assert bare == ["Hide the parameters", "Hide what is imported"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_describes_itself_to_who_links_to_it(seen, name):
    head = seen(name, DESKTOP)["head"]
    assert len(head["description"]) > 30
    assert head["og:title"] and head["og:description"] == head["description"]
    assert "og:url" not in head, "nobody knows yet where the book is published"


@pytest.mark.parametrize("name", CHAPTERS)
def test_on_paper_no_fold_is_printed_and_no_line_is_cut(opened, name):
    page = opened(name, viewport={"width": 718, "height": 1000})  # the width between A4's margins
    page.emulate_media(media="print")
    page.wait_for_selector("mjx-container", state="attached", timeout=10_000)
    left = page.evaluate(
        """() => {
          const all = selector => [...document.querySelectorAll(selector)];
          const shown = node => node.getBoundingClientRect().height > 0;
          const cut = node => shown(node) && node.scrollWidth > node.clientWidth + 1;
          return {
            folds: all("main details").filter(shown).length,
            figures: all("main .cell_output img").filter(shown).length,
            cut: all("main pre, main mjx-container[display]").filter(cut).map(node => node.textContent.slice(0, 80)),
          };
        }"""
    )
    assert left["figures"] > 0
    assert (left["folds"], left["cut"]) == (0, [])


def test_the_fold_of_a_chart_is_dark_in_the_dark(opened):
    page = opened(CLOSER[0], color_scheme="dark")
    ground = page.locator(".text_html:has(details.closer)").first.evaluate(
        "node => getComputedStyle(node).backgroundColor"
    )
    assert ground == "rgba(0, 0, 0, 0)"


def test_a_term_shows_its_definition_under_the_mouse_without_a_network(opened):
    page = opened(CHAPTERS[1])
    page.wait_for_function("document.readyState === 'complete'")
    page.locator("article a[href*='#term-trait']").first.hover()
    tip = page.locator(".tippy-box")
    tip.wait_for(timeout=5_000)
    assert len(tip.inner_text().split()) > 8


@pytest.mark.parametrize("name", PAGES)
def test_every_fold_opens_when_clicked(seen, name):
    folds = seen(name, DESKTOP)["folds"]
    assert [fold["text"] for fold in folds if not fold["opens"]] == []
    if name in CHAPTERS:
        solutions = [fold for fold in folds if fold["solution"]]
        assert solutions
        assert not any(fold["wasOpen"] for fold in solutions)


@pytest.mark.parametrize("name", CHAPTERS)
def test_formulas_are_set_without_a_network(seen, name):
    assert seen(name, DESKTOP)["set"] >= seen(name, DESKTOP)["formulas"] > 0


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_output_is_a_wall_of_text_or_a_warning(seen, name):
    for output in seen(name, DESKTOP)["outputs"]:
        assert output.count("\n") <= 60, output[:400]
        assert not re.search(r"\w*Warning\b|Traceback", output), output[:400]
        assert not re.fullmatch(r"'.*'", output.strip()), f"{output}: a value that nobody meant to show"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_with_its_figures_is_light(site, seen, name):
    sources = {image["source"] for image in seen(name, DESKTOP)["images"]}
    files = [Path(source.removeprefix("file://")) for source in sources if source.startswith("file:")]
    assert (site / f"{name}.html").stat().st_size + sum(file.stat().st_size for file in files) <= LARGEST_PAGE


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_from_its_ground_in_both_themes(opened, name, theme):
    """At the contrast of 4.5 that the Web Content Accessibility Guidelines ask for."""
    page = opened(name, color_scheme=theme)
    assert page.locator("html").get_attribute("data-theme") == theme
    assert page.evaluate(UNREADABLE) == []


@pytest.fixture
def searched(site, opened):
    """The addresses that a search finds, best first."""

    def search(words):
        page = opened("search")
        page.goto((site / "search.html").as_uri() + "?q=" + words.replace(" ", "+"))
        page.wait_for_selector("#search-results li a", timeout=10_000)
        return page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")

    return search


@pytest.mark.parametrize("term", ["persona vector", "placebo"])
def test_search_finds_a_term_of_the_glossary(searched, term):
    assert any("book/glossary.html" in target for target in searched(term))


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("inoculation", "02_ip_loss_reduction"),
        ("refusal", "04_refusal_redistribution"),
        ("filtering", "05_fihs_filtering"),
    ],
)
def test_search_finds_a_chapter_before_the_package_s_modules(searched, words, page):
    found = searched(words)
    assert any(page in target for target in found[:8])
    assert not any("book/api/" in target for target in found[:3])


def test_search_finds_a_class_by_its_name(searched):
    assert any(target.endswith("helpers.interventions.Steer") for target in searched("Steer")[:3])


@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("book/api/") and page != "book/api/index"])
def test_a_reference_page_begins_each_module_with_a_table_and_shows_the_source(opened, name):
    page = opened(name)
    modules = page.locator("article section:has(> h2)")
    for section in modules.all():
        assert section.locator("table.autosummary").count() == 1
        assert section.locator(".highlight-pycon").count() >= 1
        first = section.locator("dl.py > dt.sig").first
        assert "data" not in (first.locator("xpath=..").get_attribute("class") or "").split() or (
            section.locator("dl.py.function, dl.py.class, dl.py.exception").count() == 0
        )
        if section.locator("dl.py.function, dl.py.class").count():
            assert section.locator("a:has(.viewcode-link)").count() >= 1


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_lines_of_a_method_are_highlighted_and_lead_to_their_place_in_the_whole_file(opened, name):
    page = opened(name)
    listings = page.locator(".tag_remove-input .cell_output .highlight-python")
    links = page.locator(".tag_remove-input .cell_output p:has-text('From') a")
    assert listings.count() == links.count() > 0
    for listing, link in zip(listings.all(), links.all(), strict=True):
        colours = "node => new Set([...node.querySelectorAll('span')].map(e => getComputedStyle(e).color)).size"
        assert listing.evaluate(colours) > 2
        text = listing.inner_text()
        (defined,) = re.findall(r"^def (\w+)\(", text, flags=re.MULTILINE)
        file, _, place = link.evaluate("node => node.href").removeprefix("file://").partition("#")
        led = place.rpartition(".")[2]  # to the class of a property, which has no place of its own
        assert led == defined or (text.startswith("@property") and led[0].isupper())
        assert f'id="{place}"' in Path(file).read_text("utf-8")


@pytest.mark.parametrize("name", CLOSER)
def test_a_chart_to_look_closer_at_needs_no_javascript_and_answers_to_hover_focus_and_legend(opened, name):
    page = opened(name, java_script_enabled=False)
    fold = page.locator("details.closer").first
    assert page.locator("main .cell_output img").first.is_visible()
    assert not fold.locator("svg").is_visible()
    fold.locator("summary").click()
    assert fold.locator("svg").is_visible()
    point = fold.locator(".note").first
    point.focus()
    assert point.locator("b").is_visible()
    fold.locator(".note i").last.hover()
    assert fold.locator(".note b").last.is_visible()
    assert not point.locator("b").is_visible(), "one note at a time"
    fold.locator("input").first.uncheck()
    assert fold.locator("svg .s0").first.is_hidden()
    assert fold.locator(".note.s0 i").first.is_hidden()
    page.emulate_media(media="print")
    assert not fold.is_visible()


def test_tokens_tell_their_values_and_signs(opened):
    page = opened(CLOSER[0])
    fold = page.locator("details.closer", has=page.locator(".token"))
    fold.locator("summary").click()
    for sign in ("plus", "minus"):
        token = fold.locator(f".token.{sign}").first
        token.hover()
        assert "undefended" in token.locator("b").inner_text()
        assert token.evaluate(
            "node => getComputedStyle(node).borderTopColor != getComputedStyle(node).borderBottomColor"
        )
