"""The page of a report in a real browser."""

import shutil

import pytest

from corrsteer_pl.commands.report import report_on
from tests.evaluation.runs import OTHERS, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Every text that is shown, with its contrast against what lies behind it (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parsed = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parsed(getComputedStyle(node).backgroundColor);
      if (colour.length && colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || ["SCRIPT", "STYLE", "defs"].includes(node.tagName) || node.getClientRects().length === 0) continue;
    const style = getComputedStyle(node), svg = node.closest("svg");
    const one = luminance(parsed(svg ? style.fill : style.color)), other = luminance(behind(svg || node));
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one, other = (
        write_run(folder / "one"),
        write_run(folder / "other", OTHERS),
    )
    report_on([one])
    report_on([one, other])
    return {"report": one / "report.html", "compare": other / "report-against-one.html"}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def opened(browser, pages):
    """Opens a page, and finds out at the end whether it complained or asked for anything."""
    complaints, contexts = [], []

    def opening(name, width=1280, scheme="light", script=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url[:5] else None)
        page.goto(pages[name].as_uri())
        return page

    yield opening
    for context in contexts:
        context.close()
    assert [one for one in complaints if not one.startswith("data:")] == []


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(opened, name, width):
    page = opened(name, width)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened, name, scheme):
    page = opened(name, scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    assert [pair for pair in found if pair[0] < 4.5] == []


def test_search_keeps_the_answers_that_have_a_word(opened):
    page = opened("report")
    field, answers = page.get_by_label("Search these answers"), page.locator("details.changed")
    whole = answers.count()
    assert whole == page.locator("details.changed:visible").count() > 10
    field.fill("QUESTION 13?")
    assert page.locator("details.changed:visible").count() == 1
    assert page.locator("#found").text_content() == f"1 of {whole} have it"
    shown = page.locator("details.changed:visible")
    assert not shown.locator(".pair").is_visible()
    shown.locator("summary").click()
    assert shown.locator(".pair").is_visible()
    assert shown.locator("mark").all_text_contents() == ["cat", "hen", " down"]
    field.fill("")
    assert page.locator("details.changed:visible").count() == whole


def test_a_page_can_be_read_without_scripts(opened):
    page = opened("report", script=False)
    assert page.locator(".verdict").is_visible()
    assert not page.locator("input[type=search]").is_visible()
    page.locator("details.changed summary").first.click()
    assert page.locator("details.changed .pair").first.is_visible()
    assert page.locator("svg.figure").count() == 7


def test_paper_shows_what_is_folded(opened):
    page = opened("report")
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    height = page.locator("details.changed").first.evaluate("node => node.getBoundingClientRect().height")
    page.emulate_media(media="screen")
    assert height > 2 * page.locator("details.changed").first.evaluate("node => node.getBoundingClientRect().height")
