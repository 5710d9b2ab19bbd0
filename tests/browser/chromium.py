"""Which browser the tests drive."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "there is no Chromium: install it (Debian, Ubuntu: apt-get install chromium) and run again"


def find_chromium() -> str | None:
    """Return the path of the system's Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def reason_to_skip() -> str | None:
    """Return why browser tests can not run here; None where they can, and where they have to."""
    # Continuous integration installs it: there a browser that is not found is a failure.
    return MISSING if find_chromium() is None and os.environ.get("CI") != "true" else None
