"""MovieLens in, recommendations out over HTTP, on this machine: what `make quickstart` runs.

It runs the pipeline of configs/movielens.yaml (ml-latest-small), starts the service, asks it for three
users, and stops it again. Where MovieLens can not be downloaded and no mirror is given, it goes on with the
generated catalogue of configs/generated.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from jobs import command, pipeline, stages
from twotower.config import Config, MovieLensSource, load_config
from twotower.data.dataset import Dataset
from twotower.errors import DownloadError
from twotower.progress import say, stage
from twotower.schema import KINDS

_CONFIGS = Path(__file__).parents[1] / "configs"
_NUM_USERS = 3
_NUM_LIKED = 5
_K = 10
_LIKED_WEIGHT = 0.7
_TIMEOUT_S = 30


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from serve.running import running

    begin = time.monotonic()
    overrides = [item for group in arguments.set for item in group]
    path = Path(arguments.config)
    try:
        dataset = stages.dataset_for(config)
    except DownloadError as error:
        if config.mirror or not isinstance(config.data.source, MovieLensSource):
            raise
        say(f"{error}")
        say("")
        say("MovieLens could not be downloaded, and no mirror is given (TWOTOWER_MIRROR or data.mirror).")
        say("Going on with the generated catalogue: users and items with planted tastes, not real ones.")
        path = _CONFIGS / "generated.yaml"
        overrides = [item for item in overrides if not item.startswith(("data.", "features."))]
        config = load_config(path, overrides)
        dataset = stages.dataset_for(config)
    result = pipeline.run(config, dataset)

    stage("serve")
    with running(config) as url:
        command.stop_on_sigterm()
        say(f"the service answers at {url}")
        for user_row in _users(dataset):
            _ask(url, dataset, user_row)
    say("the service is stopped")

    stage(f"done in {time.monotonic() - begin:.0f} s")
    say(f"report      {Path(result.details['report']) / 'report.html'}")
    say(f"generation  {result.path}")
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    same = " ".join([f"--config {shown}", *(["--set", *overrides] if overrides else [])])
    say("next:")
    say(f"  .venv/bin/python -m jobs.serve {same}        keep it running (make serve)")
    say(f"  .venv/bin/python -m jobs.recommend {same}     the top k of every user as Parquet")
    say("  .venv/bin/python -m jobs.pipeline --config configs/own-data.yaml    your own files (README.md)")
    return result


def _users(dataset: Dataset) -> list[int]:
    """Return rows of users with a history, spread over the vocabulary."""
    counts = np.diff(dataset.interactions.user_offsets)
    candidates = np.flatnonzero(counts >= min(_NUM_LIKED, counts.max()))
    places = np.linspace(0, len(candidates) - 1, _NUM_USERS + 2)[1:-1].astype(np.int64)
    return [int(row) for row in candidates[np.unique(places)]]


def _ask(url: str, dataset: Dataset, user_row: int) -> None:
    user_id = dataset.user_ids.id(user_row)
    liked = _liked_titles(dataset, user_row)
    answer, round_trip_ms = _post(f"{url}/v1/retrieve", {"user_id": user_id, "k": _K, "fields": ["title"]})
    say("")
    say(f"user {user_id} liked last: {'; '.join(liked)}")
    timing = answer["timing_ms"]
    say(
        f"recommended ({answer['strategy']}; {timing['total']:.2f} ms in the service, of it encode "
        f"{timing['encode']:.2f} and search {timing['search']:.2f}; {round_trip_ms:.2f} ms round trip):"
    )
    for rank, item in enumerate(answer["items"], 1):
        say(f"{rank:>4}. {item['score']:.3f}  {item.get('title') or item['item_id']}")


def _liked_titles(dataset: Dataset, user_row: int) -> list[str]:
    """Return titles (or ids) of the latest catalogue items that the user gave a high weight, latest first."""
    interactions = dataset.interactions
    begin, end = interactions.user_offsets[user_row : user_row + 2]
    rows = interactions.item_row[begin:end]
    positive = (interactions.kind[begin:end] == KINDS["positive"]) & (rows < dataset.num_catalogue_items)
    high = positive & (interactions.weight[begin:end] >= _LIKED_WEIGHT)
    latest = rows[high if high.any() else positive][::-1][:_NUM_LIKED]
    table = dataset.item_table(["item_id", "title"]).take(latest)
    return [row["title"] or row["item_id"] for row in table.to_pylist()]


def _post(url: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the JSON answer and the round trip in milliseconds of the second of two equal requests."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    # The first request of a fresh process warms caches; the second shows the steady state.
    for _ in range(2):
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            answer = json.load(response)
        elapsed_ms = (time.perf_counter() - begin) * 1e3
    return answer, elapsed_ms


JOB = command.Job("quickstart", __doc__, work, default_config=str(_CONFIGS / "movielens.yaml"))
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
