"""The demo page for whoever uses it: hostile data, phones, keyboards, colours, tokens."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from playwright.sync_api import Browser, expect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api import make_api
from serve.demo import PAGE_PATHS
from serve.fused import FusedService
from serve.schemas import error_body
from tests.browser.visit import Visit, answered, shown, visiting
from tests.service import Client
from tests.shop import HOSTILE_TITLES, NUM_ITEMS
from twotower.cluster.processes import free_port
from twotower.retrieval.retriever import Retriever

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
COLOURS = """() => {
  const seen = (element, property) => getComputedStyle(element)[property];
  const root = document.documentElement;
  const quiet = seen(document.querySelector(".quiet"), "color");
  const button = document.querySelector(".primary");
  return {
    ink: [seen(root, "color"), seen(root, "backgroundColor")],
    quiet: [quiet, seen(root, "backgroundColor")],
    button: [seen(button, "color"), seen(button, "backgroundColor")],
    link: [seen(document.querySelector("nav a"), "color"), seen(root, "backgroundColor")],
  };
}"""
OVERFLOWING = """(width) => [...document.querySelectorAll("body *")].filter((each) => {
  const box = each.getBoundingClientRect();
  return box.width > 0 && box.right > width + 0.5 && !each.closest(".skip");
}).map((each) => `${each.tagName} ${each.id} ${each.className} ${each.getBoundingClientRect().right}`)"""
NAMELESS = """() => {
  const named = (each) => each.labels?.length || each.tagName !== "SELECT" && each.textContent.trim()
    || each.getAttribute("aria-label") || each.getAttribute("aria-labelledby");
  const controls = document.querySelectorAll("input, select, button, a, dialog, [role='listbox']");
  return [...controls].filter((each) => !named(each)).map((each) => each.outerHTML);
}"""


def test_hostile_titles_are_text(visit: Visit, client: Client) -> None:
    page = visit.open()
    title = page.title()
    page.get_by_label("Items wanted").fill("200")
    page.get_by_label("Leave out what was seen already").uncheck()
    visit.ask("5")
    expect(page.locator("#items > li")).to_have_count(NUM_ITEMS)
    titles = page.locator("#items .title").all_text_contents()
    assert set(HOSTILE_TITLES.values()) <= set(titles)
    opener = page.locator("#items .title").get_by_text(HOSTILE_TITLES[12])
    opener.click()
    expect(page.get_by_role("dialog").get_by_role("heading")).to_have_text(f"Similar to {HOSTILE_TITLES[12]}")
    expect(page.locator("#similar-items > li")).to_have_count(10)
    page.get_by_role("button", name="Close").click()
    page.get_by_role("radio", name="A few items").check()
    search = page.get_by_role("combobox", name="Items he or she liked")
    for number in (12, 23):
        search.fill(HOSTILE_TITLES[number][:12])
        option = page.locator("#item-options [role=option]")
        expect(option).to_have_count(1)
        option.click()
    chosen = [e.text_content() for e in page.locator("#chosen > li > span").all()]
    assert chosen == [HOSTILE_TITLES[12], HOSTILE_TITLES[23]]
    visit.settled()
    visit.page.locator("body").evaluate("(body) => new Promise((done) => setTimeout(done, 0))")
    assert page.locator("main img, main script, dialog img, dialog script").count() == 0
    assert page.title() == title
    # The same text as markup would have done it: this is what the page must never do.
    page.locator("#status").evaluate("(box, text) => { box.innerHTML = text; }", HOSTILE_TITLES[12])
    assert page.locator("main img").count() == 1
    assert any("Content Security Policy" in text for text in wait_for_complaint(visit))
    assert page.title() == title
    visit.complaints.clear()


def wait_for_complaint(visit: Visit) -> list[str]:
    for _ in range(100):
        if visit.complaints:
            break
        visit.page.wait_for_timeout(50)
    return visit.complaints


@pytest.mark.parametrize("screen", [PHONE], ids=["phone"])
def test_nothing_is_wider_than_a_phone(visit: Visit, screen: dict[str, Any]) -> None:
    page = visit.open()
    width = "document.documentElement.scrollWidth"
    page.get_by_label("Items wanted").fill("200")
    page.get_by_label("Leave out what was seen already").uncheck()
    for _ in range(2):
        page.get_by_role("button", name="Add a filter").click()
    page.locator(".filter").last.get_by_label("Attribute").select_option("year")
    visit.ask("5")
    # The longest word of a title is wider than the screen.
    long = page.locator("#items .title").get_by_text(HOSTILE_TITLES[30])
    assert long.bounding_box()["height"] > 40  # type: ignore[index]
    assert page.evaluate(width) == 360
    assert page.evaluate(OVERFLOWING, 360) == []
    long.click()
    expect(page.locator("#similar-items > li")).to_have_count(10)
    dialog = page.locator("#similar")
    assert dialog.evaluate("(each) => each.scrollWidth <= each.clientWidth")
    assert page.evaluate(OVERFLOWING, 360) == []
    page.get_by_role("button", name="Close").click()
    visit.ask("x" * 600)
    expect(page.locator("#history-note")).to_contain_text("is not known")
    assert page.evaluate(width) == 360
    assert page.evaluate(OVERFLOWING, 360) == []


def test_keyboard_only(visit: Visit, client: Client) -> None:
    page = visit.open()
    keys = page.keyboard
    focused = page.locator(":focus")
    page.evaluate("document.activeElement.blur()")
    keys.press("Tab")
    expect(focused).to_have_text("Skip to the recommendations")
    keys.press("Enter")
    expect(page.locator("#results")).to_be_focused()
    page.get_by_label("User id").focus()
    keys.press("Control+a")
    keys.type("1")
    options = page.get_by_role("option")
    expect(options).to_have_count(8)
    ids = options.all_inner_texts()
    for _ in range(3):
        keys.press("ArrowDown")
    keys.press("ArrowUp")
    user = page.get_by_label("User id")
    active = user.get_attribute("aria-activedescendant")
    expect(page.locator(f"#{active}")).to_have_text(ids[1])
    expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")
    keys.press("Enter")
    visit.settled()
    expect(user).to_have_value(ids[1])
    expect(user).to_have_attribute("aria-expanded", "false")
    items = client.items(user_id=ids[1], k=10, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(items)
    reached: list[str] = []
    for _ in range(40):
        keys.press("Tab")
        reached.append(focused.inner_text() or focused.get_attribute("id") or "")
        if focused.inner_text() == items[0]["title"]:
            break
    assert reached[-1] == items[0]["title"]
    assert [r for r in reached if r in ("Add a filter", "k", "exclude-seen", "Recommend")] == [
        "Add a filter", "k", "exclude-seen", "Recommend",
    ]  # fmt: skip
    # What has the focus can be seen.
    assert focused.evaluate("(each) => getComputedStyle(each).outlineStyle") == "solid"
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#similar-items > li")).to_have_count(10)
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(focused).to_have_text(items[0]["title"])


def test_every_control_has_a_name_and_answers_are_announced(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("button", name="Add a filter").click()
    assert page.evaluate(NAMELESS) == []
    page.evaluate("document.body.append(document.createElement('button'))")
    assert page.evaluate(NAMELESS) == ["<button></button>"]
    for place in ("#status", "#similar-status"):
        assert page.locator(place).get_attribute("aria-live") == "polite"
    assert page.locator("#error").get_attribute("role") == "alert"
    assert page.locator("html").get_attribute("lang") == "en"


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours such as rgb(1, 2, 3), as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    "screen", [{"color_scheme": "light"}, {"color_scheme": "dark"}], ids=["light", "dark"]
)
def test_light_and_dark_are_readable(visit: Visit, screen: dict[str, Any]) -> None:
    page = visit.open()
    colours = page.evaluate(COLOURS)
    for name, (text, ground) in colours.items():
        assert contrast(text, ground) >= 4.5, name
    dark = contrast(colours["ink"][1], "rgb(0, 0, 0)") < contrast(colours["ink"][1], "rgb(255, 255, 255)")
    assert dark == (screen["color_scheme"] == "dark")


def test_what_the_page_keeps_and_asks(visit: Visit, client: Client) -> None:
    page = visit.open()
    visit.ask("7")
    paths = [request.removeprefix(client.url) for request in visit.requests]
    assert {"/", "/demo/page.js", "/demo/page.css", "/v1/generation", "/v1/retrieve"} <= set(paths)
    assert f"/demo/users/{quote('7')}/history" in paths
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert json.loads(kept) == [{}, {}, ""]
    assert visit.refusals == []


class Guarded:
    """An application that wants a bearer token for everything but the page itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.wanted = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization")
        if scope["type"] != "http" or scope["path"] in PAGE_PATHS or given == self.wanted:
            await self.app(scope, receive, send)
            return
        refusal = JSONResponse(error_body("unauthorized", "there is no valid token", "a bearer token"), 401)
        await refusal(scope, receive, send)


@contextlib.contextmanager
def guarded(library: Retriever, token: str) -> Iterator[str]:
    """Serve the generation in this process, with a token; yields the URL."""
    service = FusedService(library, 200, 1, {"active": {}, "missing": {}})
    port = free_port()
    config = uvicorn.Config(Guarded(make_api(service), token), port=port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_token_is_asked_for_and_kept_in_this_tab_only(browser: Browser, library: Retriever) -> None:
    with guarded(library, "right-token") as url:
        for visit in visiting(browser, url, {}):
            page = visit.page
            page.goto(visit.url)
            dialog = page.get_by_role("dialog", name="This service asks for a token")
            expect(dialog).to_be_visible()
            expect(page.locator("#items > li")).to_have_count(0)
            dialog.get_by_label("Bearer token").fill("wrong-token")
            page.keyboard.press("Enter")
            expect(dialog.get_by_text("That token was not accepted.")).to_be_visible()
            # A quotation mark that came along with a copy.
            dialog.get_by_label("Bearer token").fill("right-token\u201d")
            page.keyboard.press("Enter")
            expect(dialog.get_by_text("A token has ASCII characters only")).to_be_visible()
            dialog.get_by_label("Bearer token").fill("right-token")
            dialog.get_by_role("button", name="Continue").click()
            expect(page.locator("#items > li")).to_have_count(10)
            expect(dialog).to_be_hidden()
            refused = len(visit.refusals)
            page.reload()
            expect(page.locator("#items > li")).to_have_count(10)
            assert visit.refusals[refused:] == []
            assert set(visit.refusals) == {401}
            assert page.evaluate("JSON.stringify([localStorage, document.cookie])") == '[{},""]'
            assert "token" not in page.url
            # Another tab is asked again.
            other = page.context.new_page()
            other.goto(visit.url)
            expect(other.get_by_role("dialog", name="This service asks for a token")).to_be_visible()
            other.keyboard.press("Escape")
            expect(other.locator("#error")).to_contain_text("The service asks for a token.")
            other.close()
