"""The demo page when another generation takes its place under it, and below a finger."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.visit import Visit, answered, shown
from tests.service import Client

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def open_on_an_older_generation(visit: Visit, client: Client) -> Page:
    """Load the page as it was when a generation answered that had another column and attribute."""
    known = client.get("/v1/generation").json
    known["id"] = "g0"
    known["item_fields"].append("mood")
    known["attributes"]["mood"] = {"type": "text", "operators": ["any_of", "none_of"]}

    def older(route: Route) -> None:
        route.fulfill(json=known)

    visit.page.route("**/v1/generation", older)
    visit.page.goto(visit.url)
    expect(visit.page.locator("#generation")).to_contain_text("generation g0")
    # Two filters on what there will be no more, and one on what stays.
    for attribute in ("mood", "year", "mood"):
        visit.page.get_by_role("button", name="Add a filter").click()
        visit.page.locator(".filter").last.get_by_label("Attribute").select_option(attribute)
    row = visit.page.locator(".filter").nth(1)
    row.get_by_label("Condition").select_option(label="at least")
    row.get_by_label("Bound").fill("1990")
    row.get_by_label("Bound").press("Tab")
    visit.settled()
    visit.page.unroute("**/v1/generation")
    return visit.page


def test_a_page_that_was_opened_before_a_swap_goes_on(visit: Visit, client: Client) -> None:
    page = open_on_an_older_generation(visit, client)
    visit.ask("7")
    expect(page.locator("#generation")).to_contain_text("generation g1")
    wanted = {"year": {"gte": 1990}}
    items = client.items(user_id="7", k=10, filter=wanted, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(items)
    assert items != client.items(user_id="7", k=10, fields=["title"])
    expect(page.locator("#error")).to_be_hidden()
    assert page.locator(".filter").count() == 1
    assert page.get_by_label("Bound").input_value() == "1990"
    assert visit.fact("generation") == "g1"
    # The column that is gone was asked for, and refused.
    assert set(visit.refusals) == {422}


def test_similar_items_after_a_swap(visit: Visit, client: Client) -> None:
    page = open_on_an_older_generation(visit, client)
    # Not one of those outside the catalogue, which are shown by their ids.
    page.locator("#history .title").get_by_text("Title").first.click()
    expect(page.locator("#similar-items > li")).to_have_count(10)
    expect(page.locator("#similar-error")).to_be_hidden()
    expect(page.locator("#generation")).to_contain_text("generation g1")


def test_similar_items_ask_for_no_filter(visit: Visit, client: Client) -> None:
    page = visit.open()
    for _ in range(2):
        page.get_by_role("button", name="Add a filter").click()
        page.locator(".filter").last.get_by_label("Attribute").select_option("year")
        page.locator(".filter").last.get_by_label("Condition").select_option(label="at least")
        page.locator(".filter").last.get_by_label("Bound").fill("1990")
    title = page.locator("#items .title").first
    with page.expect_request("**/similar?**") as heard:
        title.evaluate("(each) => each.click()")
    assert "filter" not in heard.value.url
    expect(page.locator("#similar-items > li")).to_have_count(10)
    expect(page.locator("#similar-error")).to_be_hidden()


def finger(page: Page, *path: tuple[float, float]) -> None:
    """Put a finger down, move it along a path, and lift it."""
    session = page.context.new_cdp_session(page)

    def event(kind: str, *points: dict[str, Any]) -> None:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    for i, (x, y) in enumerate(path):
        event("touchMove" if i else "touchStart", {"x": x, "y": y})
        page.wait_for_timeout(30)
    event("touchEnd")
    session.detach()


@pytest.mark.parametrize("screen", [PHONE], ids=["phone"])
def test_a_finger_scrolls_suggestions_and_a_tap_takes_one(
    visit: Visit, client: Client, screen: dict[str, Any]
) -> None:
    page = visit.open()
    user = page.get_by_label("User id")
    user.tap()
    user.fill("3")
    options = page.locator("#user-options [role=option]")
    expect(options).to_have_count(8)
    box = options.nth(5).bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    listbox = page.locator("#user-options")
    before = listbox.evaluate("(each) => each.scrollTop")
    finger(page, *((x, y - 12 * step) for step in range(10)))
    page.wait_for_timeout(300)
    moved = listbox.evaluate("(each) => each.scrollTop") - before, page.evaluate("scrollY")
    assert max(moved) > 0, json.dumps(moved)
    assert user.input_value() == "3"
    expect(options).to_have_count(8)
    expect(listbox).to_be_visible()
    wanted = options.nth(6).inner_text()
    options.nth(6).tap()
    visit.settled()
    assert user.input_value() == wanted
    expect(listbox).to_be_hidden()
    assert shown(page.locator("#items > li")) == answered(
        client.items(user_id=wanted, k=10, fields=["title"])
    )
