"""A headless Chromium, and a page in it that may ask nobody but the service.

Playwright drives the Chromium of the system: its package brings no browser. While it runs, this thread has
a running event loop, which would disturb other tests; so it ends with each module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.chromium import MISSING, find_chromium
from tests.browser.visit import PATIENCE_MS, Visit, visiting
from tests.service import Client

ARGUMENTS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running browser."""
    program = find_chromium()
    assert program is not None, MISSING
    expect.set_options(timeout=PATIENCE_MS)
    # Its sandbox refuses to run as root.
    arguments = [*ARGUMENTS, "--no-sandbox"] if os.geteuid() == 0 else ARGUMENTS
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=arguments)
        yield running
        running.close()


@pytest.fixture
def screen() -> dict[str, Any]:
    """What a test may ask of its window."""
    return {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture
def visit(browser: Browser, client: Client, screen: dict[str, Any]) -> Iterator[Visit]:
    """A page that is not loaded yet; afterwards it must have asked nobody else and reported nothing."""
    yield from visiting(browser, client.url, screen)
