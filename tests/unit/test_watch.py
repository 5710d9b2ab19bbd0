"""The progress of a training, from the file of rank 0 to what a person reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower import progress
from twotower.pipeline import watch
from twotower.pipeline.watch import Progress, Watch, epoch_line, progress_writer


def report(epoch: int, **values: Any) -> dict[str, Any]:
    base = {"epoch": epoch, "loss": 5.0 / epoch, "temperature": 0.07, "seconds": 1.25}
    return {**base, "validation_recall": 0.125, "validation_ndcg": None, **values}


def state(epoch: int, done: int, finished: int | None = None, **values: Any) -> Progress:
    history = [report(e + 1) for e in range(epoch - 1 if finished is None else finished)]
    fields: dict[str, Any] = {"total": 1_000, "loss": 2.5, "history": history}
    return Progress(epoch=epoch, done=done, **{**fields, **values})


@pytest.fixture
def drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Function of states that returns what is shown for them in a log, line by line, every state a line."""
    monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0.0)

    def draw(*states: Progress) -> list[str]:
        shown = Watch(tmp_path / "progress", epochs=3)
        for each in states:
            shown._draw(each)
        shown._close_bar(leave=True)
        error = capsys.readouterr().err
        assert "\r" not in error
        return [line.strip() for line in error.splitlines()]

    return draw


def test_writer_writes_the_ends_of_an_epoch_and_little_between(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    write = progress_writer(path)
    seen = []
    for epoch in (1, 2):
        for done in range(100, 1_001, 100):
            write(state(epoch, done))
            seen.append(json.loads(path.read_text()))
    distinct = {(s["epoch"], s["done"]) for s in seen}
    assert distinct == {(1, 100), (1, 1_000), (2, 100), (2, 1_000)}
    write(state(2, 1_000, finished=2, loss=torch.tensor(0.75), resumed_from=7))
    assert Progress(**json.loads(path.read_text())) == state(2, 1_000, finished=2, loss=0.75, resumed_from=7)
    assert [p.name for p in tmp_path.iterdir()] == ["progress"]


def test_writer_reads_the_loss_only_where_it_writes(tmp_path: Path) -> None:
    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 1.0

    write = progress_writer(tmp_path / "progress")
    for done in range(1, 50):
        write(state(1, done, loss=Loss()))
    assert Loss.reads == 1


def test_every_epoch_has_a_bar_and_then_a_line(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(
        state(1, 100),
        state(1, 500, loss=2.25),
        state(1, 1_000),
        state(1, 1_000, finished=1),
        state(2, 100),
        state(2, 1_000, finished=2),
    )
    assert lines[0].startswith("epoch 1/3: 10% 100/1.00k examples, ")
    assert any(text.startswith("epoch 1/3: 50%") and ", loss 2.250, " in text for text in lines)
    finished = [i for i, line in enumerate(lines) if "temperature" in line]
    assert [lines[i] for i in finished] == [
        "epoch 1/3: loss 5.0000, temperature 0.0700, validation recall 0.1250, 1.2 s",
        "epoch 2/3: loss 2.5000, temperature 0.0700, validation recall 0.1250, 1.2 s",
    ]
    assert all(line.startswith("epoch 1/3") for line in lines[: finished[0]])
    assert all(line.startswith("epoch 2/3") for line in lines[finished[0] + 1 :])
    assert finished[-1] == len(lines) - 1


def test_epochs_shorter_than_a_look_still_have_their_lines(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(state(1, 100), state(3, 200))
    assert [line.split(",")[0] for line in lines if "temperature" in line] == [
        "epoch 1/3: loss 5.0000",
        "epoch 2/3: loss 2.5000",
    ]
    assert lines[-1].startswith("epoch 3/3: 20% 200/1.00k")


def test_restart_is_said_and_the_bar_goes_back(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(
        state(2, 900),
        state(2, 400, resumed_from=14),
        state(2, 300, resumed_from=14),
        state(1, 100),
    )
    said = [line for line in lines if "started again" in line]
    assert said == [
        "the workers were started again; the training goes on from step 14, in epoch 2/3",
        "the workers were started again; the training goes on from step 14, in epoch 2/3",
        "the workers were started again; the training goes on from the beginning",
    ]
    assert lines[lines.index(said[0]) + 1].startswith("epoch 2/3: 40% 400/1.00k")
    assert lines[-1].startswith("epoch 1/3: 10% 100/1.00k")


def test_restart_behind_what_was_seen_is_said_too(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(state(2, 300, resumed_from=10), state(2, 600, resumed_from=14))
    assert sum("started again" in line for line in lines) == 1


def test_lost_epoch_is_shown_again_when_it_was_made_again(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(state(2, 100), state(1, 900, resumed_from=9), state(2, 200, resumed_from=9))
    assert sum(line.startswith("epoch 1/3: loss 5.0000") for line in lines) == 2


def test_resumed_run_says_where_it_goes_on(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(state(2, 600, resumed_from=14), state(2, 700, resumed_from=14))
    assert lines[0] == "the training goes on from step 14, in epoch 2/3"
    assert not any("started again" in line for line in lines)
    assert any(line.startswith("epoch 2/3: 60%") for line in lines)


def test_stream_of_unknown_length_and_a_loss_that_is_nan(drawn: Callable[..., list[str]]) -> None:
    lines = drawn(state(1, 1_500, total=None, loss=math.nan))
    assert lines[0].startswith("epoch 1/3: 1.50k examples, ")
    assert ", loss nan" in lines[-1]


def test_watch_draws_what_a_worker_writes_and_removes_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_POLL_S", 0.01)
    path = tmp_path / "progress"
    path.write_text("of an earlier run")
    with Watch(path, epochs=3):
        assert not path.exists()
        write = progress_writer(path)
        write(state(1, 500))
        # The last state is drawn however soon the end comes.
        write(state(1, 1_000, finished=1))
    assert not path.exists()
    assert "epoch 1/3: loss 5.0000" in capsys.readouterr().err


def test_epoch_line_has_all_validation_metrics() -> None:
    assert epoch_line(report(1, validation_ndcg=0.5), 4) == (
        "epoch 1/4: loss 5.0000, temperature 0.0700, validation recall 0.1250 ndcg 0.5000, 1.2 s"
    )
    assert "validation" not in epoch_line(report(1, validation_recall=None), 4)
