"""What ``benchmarks.rectools`` trains on, how it takes turns, and what it says without the other side."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rectools as benchmark
from benchmarks.train import LENGTH

ECHO = """
import json, sys
for count, line in enumerate(sys.stdin, 1):
    if count == 3:
        sys.exit("enough")
    print(json.dumps({"positions": 100 * count, "seconds": 2.0}), flush=True)
"""


@pytest.mark.parametrize(("full", "least"), [(True, LENGTH + 1), (False, 2)])
def test_a_log_has_users_of_different_items_in_the_order_of_time(full: bool, least: int) -> None:
    log = benchmark.log(400, full)
    lengths = np.bincount(log["user"])
    assert (lengths.min(), len(lengths)) == (least, 400)
    assert lengths.max() == LENGTH + 1
    assert full or 7 <= np.median(lengths) <= 11
    pairs = log["user"] * benchmark.ITEMS + log["item"]
    assert len(np.unique(pairs)) == len(pairs)
    np.testing.assert_array_equal(log["time"][log["user"] == 5], np.arange(lengths[5]))
    np.testing.assert_array_equal(benchmark.log(400, full)["item"], log["item"])


def test_turns_are_asked_for_one_by_one(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True) as process:
        theirs = benchmark.Theirs(process)
        assert [theirs.turn(), theirs.turn()] == [50.0, 100.0]
        with pytest.raises(SystemExit, match="RecTools ended"):
            theirs.turn()


def test_both_sides_train_in_turn_and_the_first_turn_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    class Other:
        def turn(self) -> float:
            turns.append(1)
            return 10.0 * len(turns)

    @contextlib.contextmanager
    def other(python: Path, data: Path, steps: int) -> Iterator[Other]:
        assert python == Path("python")
        with np.load(data) as log:
            # A step is as many users on both sides.
            assert len(np.unique(log["user"])) == benchmark.BATCH * steps * 3
        yield Other()

    monkeypatch.setattr(benchmark, "BATCH", 4)
    monkeypatch.setattr(benchmark, "rectools", other)
    found = benchmark.rates(Path("python"), full=True, steps=2, turns=2)
    assert found["theirs"] == [20.0, 30.0]
    assert len(turns) == 3
    assert len(found["ours"]) == 2
    assert min(found["ours"]) > 0


@pytest.mark.slow
def test_an_environment_that_can_not_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("twotower-has-no-such-package==1.0\n")
    monkeypatch.setattr(benchmark, "PINS", pins)
    monkeypatch.setattr(benchmark, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"pins\.txt can not be installed \(.*such-package.*") as caught:
        benchmark.environment()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pins.txt"]
