"""Bars and lines on a terminal and in a log."""

from __future__ import annotations

import os
import sys
import termios
from typing import Any

import pytest

from twotower import progress


def test_terminal_shows_a_bar_that_moves_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    other, end = os.openpty()
    termios.tcsetwinsize(end, (24, 90))
    with open(other, "rb", buffering=0) as screen, open(end, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bar(200, "epoch 2/6", "examples", initial=50) as bar:
            bar.set_postfix_str("loss 5.123", refresh=False)
            bar.update(50)
            bar.refresh()
        monkeypatch.undo()
        # A terminal hands on what was written in pieces; the bar's last one ends its line.
        written = b""
        while not written.endswith(b"\n"):
            written += screen.read(10_000)
        shown = written.decode()
    last = shown.rstrip("\r\n").rsplit("\r", 1)[-1]
    assert last.startswith("   epoch 2/6:  50%|")
    assert "█" in last
    assert "| 100/200, " in last
    assert " examples/s, loss 5.123, " in last
    assert last.endswith(" left")
    assert len(last) <= 90


def test_log_gets_whole_lines_without_carriage_returns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0.0)
    with progress.bar(80_700, "epoch 2/6", "examples") as bar:
        bar.set_postfix_str("loss 5.123", refresh=False)
        bar.update(36_100)
        progress.say("between")
    shown = capsys.readouterr().err
    assert "\r" not in shown
    lines = shown.splitlines()
    assert any(
        line.startswith("   epoch 2/6: 45% 36.1k/80.7k examples, ")
        and " examples/s, loss 5.123, time left 00:0" in line
        for line in lines
    )
    assert "   between" in lines
    assert all(line == line.rstrip() for line in lines)


def test_log_has_no_line_before_its_time_but_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(10, "index", "shards") as bar:
        for _ in range(10):
            bar.update(1)
        assert capsys.readouterr().err == ""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("   index: 100% 10.0/10.0 shards, ")


@pytest.mark.parametrize("leave", [True, False])
def test_closed_bar_stays_only_where_asked_to(leave: bool, capsys: pytest.CaptureFixture[str]) -> None:
    progress.bar(10, "index", "shards", leave=leave).close()
    assert bool(capsys.readouterr().err) is leave


def test_unknown_total_has_neither_percentage_nor_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.bar(None, "epoch 1/2", "examples") as bar:
        bar.update(1_500)
    shown: Any = capsys.readouterr().err
    assert shown.startswith("   epoch 1/2: 1.50k examples, ")
    assert "%" not in shown
    assert "left" not in shown
