"""Where the browser tests run, and where they say why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.chromium import find_chromium, reason_to_skip

ROOT = Path(__file__).parents[2]


def test_without_chromium_they_are_skipped_but_not_in_continuous_integration(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    assert find_chromium() is None
    assert "apt-get install chromium" in reason_to_skip()
    monkeypatch.setenv("CI", "true")
    assert reason_to_skip() is None
    program = tmp_path / "chromium"
    program.touch(mode=0o755)
    monkeypatch.delenv("CI")
    assert find_chromium() == str(program)
    assert reason_to_skip() is None


def test_continuous_integration_installs_it_before_the_tests():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    install = next(i for i, line in enumerate(lines) if "apt-get install" in line and "chromium" in line)
    tests = next(i for i, line in enumerate(lines) if line.startswith("make test"))
    assert "export CI=true" in lines[:install]
    assert install < tests


@pytest.mark.parametrize("order", [("unit", "http", "cluster", "browser"), ("browser", "cluster", "http")])
def test_they_follow_the_tests_over_http(order):
    from tests.conftest import _longest_first

    class Item:
        def __init__(self, folder: str) -> None:
            self.path = ROOT / "tests" / folder / "test_x.py"
            self.folder = folder

    items = [Item(folder) for folder in order for _ in range(2)]
    before = list(items)
    _longest_first(items)
    assert [item.folder for item in items[:6:2]] == ["cluster", "http", "browser"]
    for folder in order:
        assert [i for i in items if i.folder == folder] == [i for i in before if i.folder == folder]
