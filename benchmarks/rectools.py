"""Training a sequence encoder over RecTools' SASRec: positions per second of each one's own fit, one thread.

``sequence_over_rectools``: a causal transformer of 2 blocks, one head, d = 64 and dropout 0.2 over the latest
50 of 12,000 items, 128 users of 51 items a step, so that nothing of RecTools' batch is padding. Each of its
positions has 256 negatives of its own, drawn uniformly (``sampled_softmax``); each of ours has 256 drawn in
the same way but shared, and the other 6,527 items of the batch. A user's first item, which follows nothing,
is an example of ours too, and counts for none.

``short_sequence_over_rectools``: the same where users have 2 to 51 items, the middle one 9, as on Beauty.

RecTools runs in a process of its own, in an environment that is made on first use (``rectools.txt``, from
the package index). It waits while ours trains, and the other way round, a few steps each in turn. Making
batches counts, reading the data does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import measure
from benchmarks.train import LENGTH, SEQUENCE_DIM, sequence_configuration
from twotower.config import Config, parse_config
from twotower.data.prepare import prepare
from twotower.training.collectives import World
from twotower.training.loop import StepReport, Trainer

PINS = Path(__file__).with_suffix(".txt")
RUNNER = Path(__file__).with_name("rectools_runner.py")
CACHE = Path(__file__).parents[1] / "runs" / "benchmarks"
THREADS = 1
ITEMS, BATCH, NEGATIVES, DROPOUT = 12_000, 128, 256, 0.2
MEDIAN, SPREAD = 9, 0.7
"""Items of a user where they differ, and the standard deviation of their logarithm."""

Ints = NDArray[np.int64]


def environment() -> Path:
    """Return the Python of an environment with the pinned packages, which is made where it is not there.

    Raises:
        SystemExit: it can not be made.
    """
    key = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"rectools-{key}"
    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.exists():
        return python
    print(f"installing {PINS.name} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "-r", str(PINS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise SystemExit(
            f"benchmarks.rectools: {PINS.name} can not be installed ({said[-1] if said else error}); it "
            "needs a package index"
        ) from None
    done.touch()
    return python


def log(users: int, full: bool, seed: int = 0) -> dict[str, Ints]:
    """Return a generated log by ``user``, ``item`` and ``time``, int64: user after user, no item twice.

    Args:
        users: how many.
        full: each has 51 items, so that 50 are predicted from the items before; otherwise 2 to 51.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    lengths = np.full(users, LENGTH + 1)
    if not full:
        drawn = np.exp(rng.normal(np.log(MEDIAN), SPREAD, users))
        lengths = np.clip(np.round(drawn), 2, LENGTH + 1).astype(np.int64)
    popularity = 1.0 / np.arange(1, ITEMS + 1) ** 0.7
    cumulated = np.cumsum(rng.permutation(popularity) / popularity.sum())
    items = np.empty(lengths.sum(), np.int64)
    ends = np.cumsum(lengths)
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        # Twice as many as are needed have enough different ones, all but surely.
        drawn = np.searchsorted(cumulated, rng.random(2 * length + 8) * cumulated[-1], side="right")
        distinct, first = np.unique(drawn, return_index=True)
        items[end - length : end] = distinct[np.argsort(first)][:length]
    place = np.arange(len(items)) - np.repeat(ends - lengths, lengths)
    return {"user": np.repeat(np.arange(users), lengths), "item": items, "time": place}


def configuration(root: Path, batch: int) -> Config:
    """Return ours: the file ``log.parquet`` of a folder, and RecTools' sizes."""
    values = sequence_configuration(str(root), 100_000, BATCH).to_json()
    values["data"]["source"] = {
        "kind": "files",
        "interactions": str(root / "log.parquet"),
        "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "s"},
    }
    # RecTools' feed-forward layers are as wide as their inputs.
    encoder = {"blocks": 2, "heads": 1, "feed_forward": 1, "dropout": DROPOUT}
    values["features"]["query"][0]["transformer"] = encoder
    values["features"]["item"][0]["unknown_rate"] = 0.0
    values["train"] |= {"global_batch_size": batch, "negatives": {"uniform": NEGATIVES}}
    return parse_config(values)


class Theirs:
    """RecTools' fit in its own process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Take the process of ``rectools_runner``."""
        self._process = process

    def turn(self) -> float:
        """Let it train for a turn and return its positions per second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("benchmarks.rectools: RecTools ended; what it printed says why")
        answer: dict[str, Any] = json.loads(line)
        return float(answer["positions"] / answer["seconds"])


@contextmanager
def rectools(python: Path, data: Path, steps: int) -> Iterator[Theirs]:
    """Run RecTools' fit on a log while the block runs.

    Args:
        python: of the environment.
        data: the log, .npz.
        steps: batches of a turn.
    """
    model = {
        "n_factors": SEQUENCE_DIM,
        "n_blocks": 2,
        "n_heads": 1,
        "session_max_len": LENGTH,
        "batch_size": BATCH,
        "loss": "sampled_softmax",
        "n_negatives": NEGATIVES,
        "dropout_rate": DROPOUT,
        "lr": 1e-3,
    }
    settings = json.dumps({"threads": THREADS, "steps": steps, "model": model})
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    command = [str(python), "-I", "-W", "ignore", str(RUNNER), str(data), settings]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield Theirs(process)
        finally:
            process.kill()


def rates(python: Path, full: bool, steps: int, turns: int) -> dict[str, list[float]]:
    """Return positions per second of ``ours`` and ``theirs``, turn by turn; one more before them warms up.

    Args:
        python: of RecTools' environment.
        full: as of ``log``.
        steps: batches of a turn.
        turns: that count.
    """
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = log(BATCH * steps * (turns + 1), full)
        np.savez(root / "log.npz", **made)
        pq.write_table(pa.table(made), root / "log.parquet")
        users = int(made["user"][-1]) + 1
        # A user's first item is an example of ours, and none of RecTools'.
        share = 1 - users / len(made["user"])
        config = configuration(root, round(BATCH * len(made["user"]) / users))
        trainer = Trainer(config, prepare(config), World(), "all")
        with rectools(python, root / "log.npz", steps) as theirs:
            at = [0, 0.0]

            def on_step(report: StepReport) -> None:
                if report.step % steps:
                    return
                seconds = time.perf_counter() - at[1]
                ours, at[0] = (report.done - at[0]) * share / seconds, report.done
                rate = theirs.turn()
                # The first turn warms both up.
                if report.step > steps:
                    found["ours"].append(ours)
                    found["theirs"].append(rate)
                at[1] = time.perf_counter()

            at[1] = time.perf_counter()
            trainer.run_epoch(on_step)
    return found


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", THREADS)
    python = environment()
    steps, turns = (2, 1) if quick else (6, 5)
    found = {
        "sequence": rates(python, True, steps, turns),
        "short_sequence": rates(python, False, steps, turns),
    }
    figures: dict[str, float] = {}
    table: list[tuple[object, ...]] = [("positions/s", "median", "all")]
    names = {"sequence": f"{LENGTH} positions a user", "short_sequence": f"1 to {LENGTH}"}
    for key, both in found.items():
        ratios = [a / b for a, b in zip(both["ours"], both["theirs"], strict=True)]
        figures[f"{key}_over_rectools"] = statistics.median(ratios)
        for who, values in (("twotower", both["ours"]), ("RecTools", both["theirs"])):
            numbers = " ".join(f"{v:,.0f}" for v in values)
            table.append((f"{who}, {names[key]}", f"{statistics.median(values):,.0f}", numbers))
        table.append(
            ("ratio", f"{figures[f'{key}_over_rectools']:.2f}", " ".join(f"{r:.2f}" for r in ratios))
        )
    measure.finish("rectools", figures, table, quick)


if __name__ == "__main__":
    main()
