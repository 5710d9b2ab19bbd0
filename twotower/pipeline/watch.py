"""A training's progress, from rank 0 to the person: a small file that the driver draws as a bar an epoch.

The worker may run on any machine that shares the folder, and may be killed and started again at any moment:
the file always holds one whole state, and the driver follows it wherever it goes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from tqdm import tqdm

from twotower.progress import bar, say

_POLL_S = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    epoch: int
    """The epoch at work, from 1."""
    done: int
    """Examples of it so far, over all ranks."""
    total: int | None
    """Examples of the whole epoch; None where nobody knows yet, as in a stream."""
    loss: SupportsFloat
    """Loss of the latest step; a scalar on a GPU is only waited for when it is written."""
    history: Sequence[Mapping[str, Any]]
    """Reports of the finished epochs."""
    resumed_from: int | None = None
    """Optimiser steps behind the checkpoint that these workers started from; None from the beginning."""


def progress_writer(path: Path) -> Callable[[Progress], None]:
    """Return a function that now and then replaces the progress file.

    Called often, it writes twice a second, and the first and last state of an epoch in any case.
    """
    last = -1.0
    epoch = (0, 0)

    def write(progress: Progress) -> None:
        nonlocal last, epoch
        now = time.monotonic()
        same_epoch = (progress.epoch, len(progress.history)) == epoch
        if same_epoch and progress.done != progress.total and now - last < _POLL_S:
            return
        last, epoch = now, (progress.epoch, len(progress.history))
        state = {**vars(progress), "loss": float(progress.loss)}
        # Not synced to disk: a crash makes it worthless, and syncing holds the training up.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)

    return write


class Watch:
    """Draws the progress file while the driver waits for Ray Train: a bar an epoch, then a line for it."""

    def __init__(self, path: Path, epochs: int) -> None:
        """Prepare to watch.

        Args:
            path: the progress file; what lies there is deleted at the beginning and at the end.
            epochs: epochs to train.
        """
        self._path = path
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._state: Progress | None = None
        self._bar: tqdm[Any] | None = None
        self._bar_epoch = 0
        self._lines = 0

    def __enter__(self) -> None:
        """Start to watch."""
        self._path.unlink(missing_ok=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Draw the last state and stop."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            state = self._read()
            if state is not None:
                self._draw(state)
            if stopping:
                break
            self._stop.wait(_POLL_S)
        # The bar of an epoch that was not finished stays to be seen.
        self._close_bar(leave=True)

    def _read(self) -> Progress | None:
        try:
            return Progress(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None

    def _draw(self, state: Progress) -> None:
        self._say_start(state)
        for report in state.history[self._lines :]:
            self._close_bar(leave=False)
            say(epoch_line(report, self._epochs))
        self._lines = len(state.history)
        self._state = state
        if any(report["epoch"] == state.epoch for report in state.history):
            return
        if self._bar is None or self._bar_epoch != state.epoch:
            self._close_bar(leave=False)
            description = f"epoch {state.epoch}/{self._epochs}"
            self._bar = bar(state.total, description, "examples", initial=state.done, leave=False)
            self._bar_epoch = state.epoch
        self._bar.set_postfix_str(f"loss {float(state.loss):.3f}", refresh=False)
        self._bar.update(state.done - self._bar.n)
        self._bar.refresh()

    def _say_start(self, state: Progress) -> None:
        """Say that the training was resumed, or its workers started again, where ``state`` is the first."""
        before = self._state
        origin = f"step {state.resumed_from}, in epoch {state.epoch}/{self._epochs}"
        if before is None:
            if state.resumed_from is not None:
                say(f"the training goes on from {origin}")
        elif (state.epoch, state.done) < (before.epoch, before.done) or (
            state.resumed_from != before.resumed_from
        ):
            self._close_bar(leave=False)
            origin = "the beginning" if state.resumed_from is None else origin
            say(f"the workers were started again; the training goes on from {origin}")

    def _close_bar(self, leave: bool) -> None:
        if self._bar is not None:
            self._bar.leave = leave
            self._bar.close()
            self._bar = None


def epoch_line(report: Mapping[str, Any], epochs: int) -> str:
    """Return what a finished epoch came to, in a line; whatever the report calls validation_NAME is in it."""
    validation = [
        f"{name.removeprefix('validation_')} {value:.4f}"
        for name, value in report.items()
        if name.startswith("validation_") and value is not None
    ]
    parts = [
        f"epoch {report['epoch']}/{epochs}: loss {report['loss']:.4f}",
        f"temperature {report['temperature']:.4f}",
        *([f"validation {' '.join(validation)}"] if validation else []),
        f"{report['seconds']:.1f} s",
    ]
    return ", ".join(parts)
