"""The demo page in a real browser, on the real service: it shows what the API answers, and nothing else."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import Locator, expect

from tests.browser.visit import Visit, answered, shown
from tests.service import Client
from tests.shop import NUM_ITEMS


def test_a_known_user(visit: Visit, client: Client) -> None:
    page = visit.open()
    page.get_by_label("User id").fill("7")
    with page.expect_response("**/v1/retrieve") as heard:
        page.get_by_role("button", name="Recommend").click()
    visit.settled()
    answer = heard.value.json()
    items = client.items(user_id="7", k=10, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(items)
    assert len(items) == 10
    assert (visit.fact("generation"), visit.fact("strategy"), visit.fact("partial")) == (
        "g1",
        "personal",
        "no",
    )
    for name in ("encode", "search", "total"):
        took = answer["timing_ms"][name]
        assert visit.fact(name) == (f"{took:.2f} ms" if took < 10 else f"{took:.1f} ms")
    assert re.fullmatch(r"\d+\.\d+ ms", visit.fact("round trip"))
    expect(page.get_by_role("status").first).to_have_text("10 items, from what this user did.")
    expect(page.locator("#generation")).to_have_text(
        f"generation g1 · {NUM_ITEMS} items · 37 users · index recall 1.000"
    )
    # Their attributes stand beside the items.
    first = client.items(user_id="7", k=1, fields=["genres", "year"])[0]
    about = page.locator("#items .about").first
    expect(about).to_contain_text(", ".join(first["genres"].split("|")))
    expect(about).to_contain_text(f"year {first['year']}")


def test_the_history_of_a_user(visit: Visit, client: Client) -> None:
    page = visit.open()
    visit.ask("7")
    history = client.get("/demo/users/7/history").json
    entries = page.locator("#history-items > li")
    assert [e.locator(".title").text_content() for e in entries.all()] == [
        item["title"] or item["item_id"] for item in history["items"]
    ]
    times = [e.locator("time") for e in entries.all()]
    assert [t.get_attribute("datetime") for t in times] == [item["time"] for item in history["items"]]
    assert all(re.search(r"\d{1,2} \w+ 202\d, \d\d:\d\d", t.inner_text()) for t in times)
    assert len(times) > 3
    expect(page.locator("#history-note")).to_contain_text(f"{history['num_seen']} different items")


def test_the_first_visit_shows_an_example(visit: Visit, client: Client) -> None:
    page = visit.open()
    examples = client.get("/demo/users?limit=4").json["users"]
    assert page.get_by_label("User id").input_value() == examples[0]
    assert [b.inner_text() for b in page.locator("#examples button").all()] == examples
    page.locator("#examples button").nth(2).click()
    visit.settled()
    items = client.items(user_id=examples[2], k=10, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(items)
    assert items != client.items(user_id=examples[0], k=10, fields=["title"])


def test_a_user_from_the_suggestions(visit: Visit, client: Client) -> None:
    page = visit.open()
    page.get_by_label("User id").press_sequentially("")
    page.get_by_label("User id").fill("3")
    options = page.get_by_role("option")
    expect(options).to_have_count(8)
    assert options.all_inner_texts() == client.get("/demo/users?prefix=3&limit=8").json["users"]
    options.nth(2).click()
    visit.settled()
    chosen = page.get_by_label("User id").input_value()
    assert chosen == client.get("/demo/users?prefix=3").json["users"][2]
    expect(options).to_have_count(0)
    assert shown(page.locator("#items > li")) == answered(
        client.items(user_id=chosen, k=10, fields=["title"])
    )


def test_items_instead_of_a_user(visit: Visit, client: Client) -> None:
    page = visit.open()
    page.get_by_role("radio", name="A few items").check()
    expect(page.locator("#history")).to_be_hidden()
    search = page.get_by_role("combobox", name="Items he or she liked")
    search.fill("TITLE 4")
    found = client.get("/demo/items?query=TITLE%204&limit=8").json["items"]
    options = page.locator("#item-options [role=option]")
    expect(options).to_have_count(len(found))
    assert len(found) > 3
    options.nth(1).click()
    # By its id, without waiting for suggestions.
    search.fill("1007")
    search.press("Enter")
    expect(page.locator("#chosen > li")).to_have_count(2)
    visit.settled()
    history = [found[1]["item_id"], "1007"]
    answer = client.retrieve(history=history, k=10, fields=["title"]).json
    expect(page.locator('[data-fact="strategy"]')).to_have_text("history")
    assert shown(page.locator("#items > li")) == answered(answer["items"])
    page.get_by_role("button", name=f"Remove {found[1]['title']}").click()
    visit.settled()
    one = client.items(history=["1007"], k=10, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(one)
    assert one != answer["items"]
    search.fill("no such title")
    search.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("No item has no such title in its title")


def test_filters_narrow_as_the_api_does(visit: Visit, client: Client) -> None:
    page = visit.open()
    page.get_by_label("Items wanted").fill("200")
    page.get_by_label("Leave out what was seen already").uncheck()
    visit.ask("5")
    expect(page.locator("#items > li")).to_have_count(NUM_ITEMS)
    filters = page.locator(".filter")

    def add(attribute: str, condition: str) -> Locator:
        page.get_by_role("button", name="Add a filter").click()
        row = filters.last
        row.get_by_label("Attribute").select_option(attribute)
        row.get_by_label("Condition").select_option(label=condition)
        return row

    def check(wanted: dict[str, Any]) -> int:
        visit.settled()
        items = client.items(user_id="5", k=200, exclude_seen=False, filter=wanted, fields=["title"])
        assert shown(page.locator("#items > li")) == answered(items)
        return len(items)

    row = add("genres", "any of")
    row.get_by_role("button", name="War").click()
    row.get_by_role("button", name="Drama").click()
    counts = [NUM_ITEMS, check({"genres": {"any_of": ["War", "Drama"]}})]
    row = add("genres", "none of")
    row.get_by_role("button", name="Comedy").click()
    wanted: dict[str, Any] = {"genres": {"any_of": ["War", "Drama"], "none_of": ["Comedy"]}}
    counts.append(check(wanted))
    for attribute, condition, bound, operator, value in (
        ("year", "at least", "1960", "gte", 1960),
        ("year", "less than", "2015", "lt", 2015),
        ("rating", "more than", "0.5", "gt", 0.5),
        ("added", "at most", "2025-11-20", "lte", "2025-11-20"),
    ):
        add(attribute, condition).get_by_label("Bound").fill(bound)
        page.get_by_role("button", name="Recommend").click()
        wanted.setdefault(attribute, {})[operator] = value
        counts.append(check(wanted))
    add("in_stock", "any of").get_by_role("button", name="true").click()
    wanted["in_stock"] = {"any_of": [True]}
    counts.append(check(wanted))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 5
    assert counts[-1] > 0
    # A second of the same kind is refused rather than passed over.
    add("genres", "none of").get_by_role("button", name="War").click()
    expect(page.get_by_role("alert")).to_contain_text("Two filters say “genres none of”")
    for _ in range(filters.count()):
        filters.last.get_by_role("button", name="Remove the filter").click()
    visit.settled()
    expect(page.locator("#items > li")).to_have_count(NUM_ITEMS)


def test_another_value_and_all_of(visit: Visit, client: Client) -> None:
    page = visit.open()
    visit.ask("5")
    page.get_by_role("button", name="Add a filter").click()
    row = page.locator(".filter")
    row.get_by_label("Condition").select_option(label="all of")
    row.get_by_role("button", name="War").click()
    row.get_by_role("button", name="Drama").click()
    visit.settled()
    both = client.items(user_id="5", k=10, filter={"genres": {"all_of": ["War", "Drama"]}}, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(both)
    assert both
    row.get_by_label("Attribute").select_option("year")
    year = client.items(user_id="5", k=1, fields=["year"])[0]["year"]
    row.get_by_label("Another value").fill(str(year))
    row.get_by_label("Another value").press("Enter")
    visit.settled()
    expect(row.get_by_role("button", name=str(year))).to_have_attribute("aria-pressed", "true")
    of_year = client.items(user_id="5", k=10, filter={"year": {"any_of": [year]}}, fields=["title"])
    assert shown(page.locator("#items > li")) == answered(of_year)
    assert 0 < len(of_year) < 10
    row.get_by_label("Another value").fill("long ago")
    row.get_by_label("Another value").press("Enter")
    visit.settled()
    expect(page.get_by_role("alert")).to_contain_text("long ago")
    expect(page.get_by_role("alert")).to_contain_text("Allowed: ")
    assert visit.refusals == [422]


def test_similar_items(visit: Visit, client: Client) -> None:
    page = visit.open()
    visit.ask("7")
    first = client.items(user_id="7", k=1, fields=["title"])[0]
    opener = page.locator("#items .title").first
    opener.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text(f"Similar to {first['title']}")
    entries = dialog.locator("#similar-items > li")
    expect(entries).to_have_count(10)
    similar = client.get(f"/v1/items/{first['item_id']}/similar?k=10&fields=title").json["items"]
    assert shown(entries) == answered(similar)
    expect(dialog.get_by_role("status")).to_contain_text("generation g1")
    # From there to the next.
    entries.nth(3).locator(".title").click()
    expect(dialog.get_by_role("heading")).to_have_text(f"Similar to {similar[3]['title']}")
    expect(entries).to_have_count(10)
    after = client.get(f"/v1/items/{similar[3]['item_id']}/similar?k=10&fields=title").json["items"]
    assert shown(entries) == answered(after)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(opener).to_be_focused()


def test_what_the_service_refuses_is_shown(visit: Visit, client: Client) -> None:
    page = visit.open()
    alert = page.locator("#error")
    page.get_by_label("Items wanted").fill("201")
    page.get_by_label("Items wanted").press("Enter")
    error = client.retrieve(user_id="0", k=201).json["error"]
    expect(alert).to_contain_text(error["message"])
    expect(alert).to_contain_text(f"Allowed: {error['allowed']}")
    expect(page.locator("#items > li")).to_have_count(0)
    expect(page.locator("#timing")).to_be_hidden()
    page.get_by_label("Items wanted").fill("5")
    page.get_by_label("Items wanted").press("Enter")
    expect(alert).to_be_hidden()
    expect(page.locator("#items > li")).to_have_count(5)
    page.get_by_role("button", name="Add a filter").click()
    page.locator(".filter").get_by_label("Attribute").select_option("rating")
    page.locator(".filter").get_by_label("Bound").fill("excellent")
    page.get_by_role("button", name="Recommend").click()
    error = client.retrieve(user_id="0", k=5, filter={"rating": {"gte": "excellent"}}).json["error"]
    expect(alert).to_contain_text(error["message"])
    expect(alert).to_contain_text(f"Allowed: {error['allowed']}")
    assert visit.refusals
    assert set(visit.refusals) == {422}


def test_every_problem_of_a_question_is_listed(visit: Visit) -> None:
    page = visit.open()
    page.get_by_label("Items wanted").fill("")
    visit.ask("x" * 1025)
    assert len(page.get_by_label("User id").input_value()) == 1025
    alert = page.locator("#error")
    expect(alert.locator("li")).to_have_count(2)
    expect(alert).to_contain_text("user_id")
    expect(alert).to_contain_text("an integer from 1 to 200")


def test_an_item_outside_the_catalogue(visit: Visit, client: Client) -> None:
    page = visit.open()
    users = (str(u) for u in range(37))
    pairs = ((u, i) for u in users for i in client.get(f"/demo/users/{u}/history").json["items"])
    user, outside = next((u, i["item_id"]) for u, i in pairs if i["title"] is None)
    visit.ask(user)
    page.locator("#history").get_by_role("button", name=outside).click()
    expect(page.locator("#similar-error")).to_contain_text(f"item '{outside}' is not in the catalogue")
    expect(page.locator("#similar-items > li")).to_have_count(0)


def test_an_unknown_user_gets_what_is_popular(visit: Visit, client: Client) -> None:
    page = visit.open()
    visit.ask("a/b ?#&")
    expect(page.locator("#history-note")).to_have_text("User 'a/b ?#&' is not known.")
    assert visit.fact("strategy") == "popular"
    assert shown(page.locator("#items > li")) == answered(client.items(k=10, fields=["title"]))
    assert visit.refusals == [404]
