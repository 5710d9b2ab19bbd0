"""The page of a report in a real browser, from disk: it asks nobody, fits, and can be read by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.report_content import HOSTILE, full_content
from tests.unit.test_sweep import BATCH, TEMPERATURE, config_of, four_results
from twotower.evaluation.page.numbers import clean
from twotower.evaluation.page.render import write_page
from twotower.evaluation.page.sweep import sweep_page

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SCREENS = [
    pytest.param({"viewport": DESK, "color_scheme": "light"}, id="desk-light"),
    pytest.param({"viewport": DESK, "color_scheme": "dark"}, id="desk-dark"),
    pytest.param({"viewport": PHONE, "color_scheme": "light", "has_touch": True}, id="phone-light"),
    pytest.param({"viewport": PHONE, "color_scheme": "dark", "has_touch": True}, id="phone-dark"),
]
DESK_ONLY = [{"viewport": DESK}]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of an evaluation's page and of a sweep's."""
    folder = tmp_path_factory.mktemp("report")
    write_page(folder, full_content())
    tune = config_of({TEMPERATURE: {"values": [0.1, 0.5]}, BATCH: {"values": [64, 128]}}).tune
    sweep = folder / "sweep.html"
    sweep.write_text(sweep_page(HOSTILE, tune, {"dataset": "d1"}, four_results(), "recall", 7, {"seed": 1}))
    return {"evaluation": folder / "report.html", "sweep": sweep}


def opened(browser: Browser, path: Path, screen: dict[str, Any]) -> Iterator[Page]:
    """A page from disk; afterwards it must have loaded nothing else and reported nothing."""
    context = browser.new_context(locale="en-GB", **screen)
    try:
        page = context.new_page()
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        yield page
        assert requests == [path.as_uri()]
        assert complaints == []
    finally:
        context.close()


@pytest.fixture(params=SCREENS)
def screen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a window is like."""
    value: dict[str, Any] = request.param
    return value


@pytest.fixture
def page(browser: Browser, reports: dict[str, Path], screen: dict[str, Any]) -> Iterator[Page]:
    """The page of an evaluation."""
    yield from opened(browser, reports["evaluation"], screen)


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const ink = rgb(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(element))].sort((x, y) => y - x);
    const name = `${element.tagName}.${element.getAttribute("class")}`;
    found[name] = Math.min(found[name] ?? 21, (a + 0.05) / (b + 0.05));
  }
  return found;
}"""


def test_text_can_be_read(page: Page, screen: dict[str, Any]) -> None:
    for summary in page.locator("summary").all()[:2]:
        summary.click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 15
    assert {name: value for name, value in found.items() if value < 4.5} == {}
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    dark = screen["color_scheme"] == "dark"
    assert (int(ground.split("(")[1].split(",")[0]) < 60) is dark
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"


@pytest.mark.parametrize("name", ["evaluation", "sweep"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, reports: dict[str, Path], name: str, width: int
) -> None:
    for page in opened(browser, reports[name], {"viewport": {"width": width, "height": 800}}):
        for summary in page.locator("summary").all():
            if not summary.evaluate("e => e.parentElement.open"):
                summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # A drawing has no text outside of itself, which others would lie upon.
        outside = page.evaluate(
            """() => [...document.querySelectorAll(".plot > svg")].flatMap((svg) => {
              const frame = svg.getBoundingClientRect();
              return [...svg.querySelectorAll("text")].filter((text) => {
                const box = text.getBoundingClientRect();
                return box.width && (box.left < frame.left - 4 || box.right > frame.right + 4);
              }).map((text) => text.textContent);
            })"""
        )
        assert outside == []


@pytest.mark.parametrize("screen", [SCREENS[2].values[0]])
def test_small_things_are_large_enough_for_a_finger(page: Page) -> None:
    for element in page.locator("button, summary, nav a").all():
        box = element.bounding_box()
        if box is not None:
            assert box["height"] >= 24, element.inner_text()
    drawing = page.get_by_role("img", name="Recall by k")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator(".plot", has=drawing).get_by_role("status")
    # It stays when the finger is gone, inside the screen, until another place is touched.
    expect(tip).to_contain_text("Two towers")
    at = tip.bounding_box()
    assert at is not None
    assert at["x"] >= 0
    assert at["x"] + at["width"] <= PHONE["width"]
    page.touchscreen.tap(box["x"] + 5, box["y"] - 40)
    expect(tip).to_be_hidden()
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll(".plot text")]
          .filter((text) => text.getBoundingClientRect().width).map((text) =>
          parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""
    )
    assert smallest >= 10.5


@pytest.mark.parametrize("screen", DESK_ONLY)
def test_the_pointer_shows_values(page: Page) -> None:
    figure = page.locator("figure", has=page.get_by_role("heading", name="Recall by k", exact=True))
    drawing = figure.get_by_role("img", name="Recall by k")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    tip = figure.get_by_role("status")
    expect(tip).to_be_visible()
    content = full_content()["recall_by_k"]["rankers"]
    rows = [row.split("\n") for row in tip.inner_text().split("\n\n")]
    assert rows[0] == ["k = 100"]
    assert ["Two towers", f"{content['model'][-1]:.4f}"] in rows
    assert len(rows) == 1 + len(content)
    # The best first.
    assert rows[1][0] == "True model"
    page.mouse.move(box["x"], box["y"] - 80)
    expect(tip).to_be_hidden()


@pytest.mark.parametrize("screen", DESK_ONLY)
def test_the_keyboard_reads_a_chart(page: Page) -> None:
    # From the top: skip link, sections, and then the first chart.
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the report")).to_be_focused()
    for _ in range(page.locator("nav a").count() + 1):
        page.keyboard.press("Tab")
    plot = page.locator(".plot").first
    expect(plot).to_be_focused()
    tip = plot.get_by_role("status")
    expect(tip).to_contain_text("Two towers")
    expect(tip).to_contain_text("0.1800")
    page.keyboard.press("ArrowDown")
    expect(tip).to_contain_text("95% interval")
    expect(tip).to_contain_text("0.1500")
    page.keyboard.press("End")
    expect(tip).to_contain_text("True model")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    # Behind the first two charts, whose values are in the table, the next has them below it.
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.locator("summary").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("table", name="Recall by k")).to_be_visible()


@pytest.mark.parametrize("screen", DESK_ONLY)
def test_titles_of_others_are_shown_as_text(page: Page) -> None:
    plot = page.locator(".map .plot")
    plot.focus()
    page.keyboard.press("Home")
    # The most popular item comes first.
    expect(plot.get_by_role("status")).to_contain_text(clean(HOSTILE)[:60])
    expect(page.locator(".items .title").first).to_have_text(clean(HOSTILE, 120))
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("screen", DESK_ONLY)
def test_a_group_of_the_map_is_brought_out(page: Page) -> None:
    crime = page.get_by_role("button", name="Crime (")
    crime.click()
    expect(crime).to_have_attribute("aria-pressed", "true")
    opacity = "e => getComputedStyle(e).opacity"
    groups = page.locator(".map g.group")
    pressed = int(crime.get_attribute("data-series") or "")
    shown = [float(group.evaluate(opacity)) for group in groups.all()]
    assert [value == 1 for value in shown] == [place == pressed for place in range(len(shown))]
    crime.click()
    assert {float(group.evaluate(opacity)) for group in groups.all()} == {1.0}


def test_nothing_is_lost_without_the_script(browser: Browser, reports: dict[str, Path]) -> None:
    for page in opened(browser, reports["evaluation"], {"viewport": DESK, "java_script_enabled": False}):
        expect(page.get_by_role("table", name="Accuracy at 10")).to_be_visible()
        expect(page.get_by_role("img", name="Recall by k")).to_be_visible()
        page.locator("summary", has_text="Values of Recall by k").click()
        expect(page.get_by_role("table", name="Recall by k")).to_be_visible()


@pytest.mark.parametrize("screen", DESK_ONLY)
def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    assert all(button.inner_text().strip() for button in page.get_by_role("button").all())
    images = page.get_by_role("img").all()
    assert len(images) > 10
    for image in images:
        assert image.get_attribute("aria-label")
    for region in page.locator("[tabindex='0']").all():
        assert region.get_attribute("aria-label")
        assert region.get_attribute("role")
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("navigation", name="Sections").count() == 1
    assert page.get_by_role("alert").inner_text().startswith("Collapse.")
    for table in page.get_by_role("table").all():
        assert table.get_by_role("rowheader").count() >= 1
        assert table.get_by_role("caption").inner_text()
