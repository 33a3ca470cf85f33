"""make html: the pages hold together, need no network, and can be read on a phone and in the dark."""

import html.parser
import itertools
import pathlib
import shutil
import subprocess
import sys
import urllib.parse

import nbformat
import pytest

for module in ("sphinx", "myst_nb", "furo"):
    pytest.importorskip(module, reason=f"{module} is missing: pip install -r tools/html/requirements.txt")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = ["index.html", *(f"notebooks/{path.stem}.html" for path in NOTEBOOKS)]

# Boxes that scroll sideways, by what is at their head.
SCROLLING = """selector => [...document.querySelectorAll(selector)].filter(e => e.scrollWidth > e.clientWidth)
    .map(e => e.innerText.slice(0, 200))"""

# The lowest contrast of a text to its ground, as WCAG 2 defines it, with that text.
CONTRAST = """() => {
    const channels = text => text.match(/[\\d.]+/g).map(Number)
    const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
    const ground = e => {
        const colour = channels(getComputedStyle(e).backgroundColor)
        return colour[3] == 0 ? ground(e.parentElement) : colour
    }
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
    while (texts.nextNode()) {
        const text = texts.currentNode, e = text.parentElement
        if (text.data.trim() && e.checkVisibility() && !e.matches("script, style, .headerlink")) {
            const [low, high] = [channels(getComputedStyle(e).color), ground(e)].map(light).sort((a, b) => a - b)
            found.push([(high + 0.05) / (low + 0.05), text.data.trim()])
        }
    }
    return found.sort((a, b) => a[0] - b[0])[0]
}"""

# What is beyond the edges of the window, unless it is in a box of its own that scrolls, as code and tables are.
OUTSIDE = """width => {
    const scrolls = e => e.tagName != "ARTICLE"
        && (getComputedStyle(e).overflowX != "visible" || scrolls(e.parentElement))
    const beyond = ({left, right}) => left < 0 || right > width
    return [...document.querySelectorAll("article *")].filter(e =>
        beyond(e.getBoundingClientRect()) && !scrolls(e.parentElement)).map(e => e.outerHTML)
}"""


IN_VIEW = """e => {
    const {top, bottom, left, right} = e.getBoundingClientRect()
    return top >= 0 && bottom <= innerHeight && left >= 0 && right <= innerWidth
}"""


class Page(html.parser.HTMLParser):
    """The ids, addresses, pictures and links to neighbours of one page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.addresses, self.alts, self.neighbours = set(), [], [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.addresses += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.alts.append(attributes.get("alt", ""))
        if tag == "a" and attributes.get("class") in ("next-page", "prev-page"):
            self.neighbours[attributes["class"]] = attributes["href"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site") / "html"
    command = "-m sphinx -q -W --keep-going -c tools/html -d".split()
    done = subprocess.run(
        [sys.executable, *command, target.parent / "doctrees", ".", target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")  # not longer: while Playwright runs, nothing else can start an event loop
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install -r tests/requirements.txt"
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium found: install chromium or google-chrome to look at the pages")
    switches = "no-sandbox disable-gpu disable-background-networking no-first-run disable-component-update disable-sync"
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=[f"--{switch}" for switch in switches.split()])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a tab of some size on a light system; fails on what its pages report or ask the network for."""
    tabs, complaints = [], []

    def visit(width=1280, height=900):
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        tab.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or complaints.append(asked.url))
        tabs.append(tab)
        return tab

    yield visit
    for tab in tabs:
        tab.close()
    assert not complaints


def test_every_notebook_is_a_page_with_a_previous_and_a_next(site):
    for k, name in enumerate(PAGES):
        found = {way: (site / name).parent / address for way, address in Page(site / name).neighbours.items()}
        expected = {"prev-page": PAGES[k - 1]} if k else {}
        expected |= {"next-page": PAGES[k + 1]} if k + 1 < len(PAGES) else {}
        assert {way: path.resolve() for way, path in found.items()} == {
            way: (site / path).resolve() for way, path in expected.items()
        }


def test_every_link_and_anchor_resolves(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert {path.relative_to(site).as_posix() for path in pages} == {*PAGES, "search.html"}  # README.md is the index
    for path, page in pages.items():
        for address in page.addresses:
            url = urllib.parse.urlsplit(address)
            assert not url.netloc or url.scheme == "https", (path.name, address)
            if url.scheme or url.netloc or path.name == "search.html" and address == "#":
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), (path.name, address)
            assert target.suffix != ".ipynb", (path.name, address)
            if url.fragment and target in pages:
                assert urllib.parse.unquote(url.fragment) in pages[target].ids, (path.name, address)


def test_every_figure_has_its_alternative_text(site):
    for path in NOTEBOOKS:
        outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
        alts = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
        assert Page(site / "notebooks" / f"{path.stem}.html").alts == alts
    for name in PAGES:
        assert all(len(alt) > 30 for alt in Page(site / name).alts)


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900), (1440, 900)])
def test_readable_and_nothing_cut(site, visit, width, height):
    tab = visit(width, height)
    for name, scheme in itertools.product(PAGES, ("light", "dark")):
        if scheme == "light":
            tab.goto((site / name).as_uri())
        tab.emulate_media(color_scheme=scheme)  # the open page follows the system
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"
        assert tab.evaluate(OUTSIDE, width) == [], name
        assert tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == [], name
        assert is_dark(tab) == (scheme == "dark")


def is_dark(tab):
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")  # rgb(r, g, b)
    return int(colour.split("(")[1].split(",")[0]) < 128


def expect_in_view(found):
    found.page.wait_for_function(IN_VIEW, arg=found.element_handle(), timeout=5000)


def test_the_contents_stand_beside_the_text(site, visit):
    tab = visit(1280, 900)
    for name in PAGES:
        tab.goto((site / name).as_uri())
        left, text, right = (tab.locator(box).bounding_box() for box in (".sidebar-drawer", "article", ".toc-sticky"))
        assert left["x"] + left["width"] <= text["x"] < text["x"] + text["width"] <= right["x"], name
        assert right["x"] + right["width"] <= 1280, name
    links = tab.locator(".toc-tree ul ul a")
    assert links.count() > 8
    for link in (links.nth(links.count() // 2), links.last):
        link.click()
        tab.locator(".scroll-current > a", has_text=link.inner_text()).wait_for()
        expect_in_view(link)
        assert tab.locator(".scroll-current").count() == 1
        current, other = (each.evaluate("e => getComputedStyle(e).color") for each in (link, links.first))
        assert current != other


def test_the_contents_fold_away_on_a_phone(site, visit):
    tab = visit(390, 844)
    tab.emulate_media(reduced_motion="reduce")
    for name in PAGES:
        tab.goto((site / name).as_uri())
        assert tab.locator(".toc-drawer").bounding_box()["x"] >= 390, name
    link = tab.locator(".toc-tree ul ul a").last
    tab.click(".toc-header-icon")
    expect_in_view(link)
    link.click()
    tab.wait_for_function("document.querySelector('.toc-drawer').getBoundingClientRect().left >= innerWidth")
    expect_in_view(tab.locator("h2").last)
    tab.goto((site / "index.html").as_uri())
    expect_in_view(tab.locator("article img"))  # the first screen reaches to the end of the first picture


@pytest.mark.parametrize("width, boxes", [(1280, "article pre, article div"), (390, ":has(> table), .text_html")])
def test_nothing_scrolls_sideways(site, visit, width, boxes):
    """On a wide screen neither code nor tables; on a phone no table, as what matters is in its last columns."""
    tab = visit(width)
    for name in PAGES:
        tab.goto((site / name).as_uri())
        assert tab.locator("article :is(pre, table)").count() > 3
        assert tab.evaluate(SCROLLING, boxes) == [], name


def test_texts_stand_out_and_figures_do_not_dazzle(site, visit):
    tab = visit()
    for name, scheme in itertools.product(PAGES, ("light", "dark")):
        tab.emulate_media(color_scheme=scheme)
        tab.goto((site / name).as_uri())
        contrast, text = tab.evaluate(CONTRAST)
        assert contrast >= 4.5, (name, scheme, text)
        figures = tab.locator("article img").evaluate_all("all => all.map(e => getComputedStyle(e).filter)")
        assert set(figures) == {"brightness(1)" if scheme == "light" else "brightness(0.85)"}


def test_a_figure_opens_in_full_size(site, visit):
    tab = visit(390, 844)
    for name in PAGES:
        tab.goto((site / name).as_uri())
        tab.locator("article img").first.click()
        picture = tab.locator("dialog img")
        width, shown = picture.evaluate("image => [image.naturalWidth, image.clientWidth]")
        assert width == shown > 900 and picture.get_attribute("alt")
        assert tab.evaluate("document.querySelector('dialog').scrollWidth") == width  # a finger moves it
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        picture.click(position={"x": 100, "y": 100})
        picture.wait_for(state="detached")
        assert tab.url == (site / name).as_uri()


def test_toggle_and_search(site, visit):
    tab = visit()
    tab.goto((site / "index.html").as_uri())
    tab.click(".theme-toggle:visible")
    assert is_dark(tab)
    tab.goto((site / PAGES[1]).as_uri())
    assert is_dark(tab)  # remembered
    tab.goto((site / "search.html").as_uri() + "?q=momentum")
    tab.wait_for_selector("#search-results li a")
