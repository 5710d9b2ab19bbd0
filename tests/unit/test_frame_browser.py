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


@pytest.mark.parametrize("turn", [0, 2, 5])
def test_they_follow_the_tests_over_http(turn):
    from tests.conftest import _lanes_apart

    class Item:
        def __init__(self, file: str, test: str) -> None:
            self.nodeid = f"tests/{file}.py::{test}"

    wanted = [
        "cluster/test_train",
        "unit/test_x",
        "http/test_serve_limits",
        "http/test_serve_sharded",
        "http/test_serve_answers",
        "browser/test_page",
    ]
    items = [Item(file, test) for file in [*wanted[turn:], *wanted[:turn]] for test in ("second", "first")]
    _lanes_apart(items)
    lanes = [item.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py") for item in items[::2]]
    assert [lanes[0], {*lanes[1:3]}, *lanes[3:]] == [wanted[0], {*wanted[1:3]}, *wanted[3:]]
    assert [item.nodeid.split("::")[1] for item in items] == ["second", "first"] * 6
