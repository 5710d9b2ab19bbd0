"""An open page of the demo in a browser: what it shows, and what it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect

PATIENCE_MS = 20_000
"""How long a page may take until it shows what is expected, on a machine that is busy with other tests."""


class Visit:
    """One open page, and all that it did."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.refusals: list[int] = []
        """Statuses of 400 and more, which Chromium reports in the console as well."""
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", lambda answer: answer.status >= 400 and self.refusals.append(answer.status))
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))

    def _console(self, message: ConsoleMessage) -> None:
        refused = "Failed to load resource: the server responded with a status of" in message.text
        if message.type in ("error", "warning") and not refused:
            self.complaints.append(message.text)

    def open(self) -> Page:
        """Load the page and wait until it shows the first recommendations."""
        self.page.goto(self.url)
        expect(self.page.locator("#items > li").first).to_be_visible()
        self.settled()
        return self.page

    def settled(self) -> None:
        """Wait until no question is open."""
        expect(self.page.locator("#results")).not_to_have_attribute("aria-busy", "true")

    def fact(self, name: str) -> str:
        """Return one of the facts above the recommendations."""
        return self.page.locator(f'[data-fact="{name}"]').inner_text()

    def ask(self, user_id: str) -> None:
        """Type a user and ask for recommendations."""
        typed = self.page.get_by_label("User id")
        typed.fill(user_id)
        # Suggestions that come late would lie on the button.
        typed.press("Tab")
        self.page.get_by_role("button", name="Recommend").click()
        self.settled()


def visiting(browser: Browser, url: str, screen: dict[str, Any]) -> Iterator[Visit]:
    """Open a window on a service, and look at what it did when it is done."""
    context = browser.new_context(locale="en-GB", **screen)
    try:
        visit = Visit(context, url + "/")
        yield visit
        assert visit.requests
        assert [asked for asked in visit.requests if not asked.startswith(url + "/")] == []
        assert visit.complaints == []
    finally:
        context.close()


def shown(items: Locator) -> list[tuple[str, str, str, str]]:
    """Return rank, title, item id and score of each item, as they stand on the page."""
    found = []
    for entry in items.all():
        about = entry.locator(".about").inner_text()
        texts = [entry.locator(name).text_content() or "" for name in (".rank", ".title", ".score")]
        found.append((texts[0], texts[1], about.split(" · ")[0], texts[2]))
    return found


def answered(items: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return what the page must show of the items of an answer."""
    return [
        (str(i + 1), item["title"] or item["item_id"], item["item_id"], f"{item['score']:.4f}")
        for i, item in enumerate(items)
    ]
