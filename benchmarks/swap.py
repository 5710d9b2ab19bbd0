"""Swapping generations under load: no failed request, no answer of two generations, and what p99 suffers.

Two generations without a common item take turns as the one that the store's pointer names, while requests
come at a constant rate, 30% of what saturates the service. Every answer is compared with what the library
answers from the generation that the answer names.

``failed_requests``: those without an answer of status 200. ``mixed_generations``: answers that are not the
known one. ``p99_during_over_before``: p99 of the requests due between the pointer's change and the end of
the old generation, over p99 of those due in the quiet before. Publishing reads every file before it changes
the pointer; requests due meanwhile are in neither.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch

from benchmarks import measure
from benchmarks.arrivals import LoadResult, percentile
from benchmarks.clients import closed_loop, require_wrk
from benchmarks.load import run_load
from twotower.environment import apply_environment
from twotower.generations.names import CURRENT

if TYPE_CHECKING:
    from benchmarks.catalogue import Catalogue

K = 100
DIM = 64
THREADS, WORKERS = 1, 2
SHARE = 0.3
"""Of the rate that saturates the service."""
CONNECTIONS = 64
MIXED = "mixed"
_POLL_S = 0.1
_LONGEST_SWAP_S = 60.0


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_items: int
    swaps: int
    quiet_s: float
    """Before each change of the pointer."""


FULL, QUICK = Size(100_000, 20, 4.0), Size(20_000, 4, 2.0)


@dataclass(frozen=True)
class Swap:
    """One change of the pointer; moments of ``time.monotonic()``."""

    quiet: float
    """From here until ``publishing`` nothing else happens."""
    publishing: float
    written: float
    """The pointer names the new generation."""
    switched: float
    """The service was first seen to answer from it."""
    freed: float
    """The service was first seen to hold no other."""


@dataclass(frozen=True)
class Known:
    """The right answers, by generation: for each body the item ids and scores."""

    ids: dict[str, list[list[str]]]
    scores: dict[str, list[list[float]]]
    answered: Counter[str] = field(default_factory=Counter)
    """Answers that were right, by generation."""

    def judge(self, number: int, status: int, content: bytes) -> str | None:
        """Return what is wrong with an answer to a body; None where nothing is, or there is none."""
        if status != 200:
            return None
        answer = orjson.loads(content)
        ids = self.ids.get(answer["generation"])
        if ids is None or [item["item_id"] for item in answer["items"]] != ids[number]:
            return MIXED
        scores = self.scores[answer["generation"]][number]
        near = all(
            abs(item["score"] - score) < 1e-5 for item, score in zip(answer["items"], scores, strict=True)
        )
        if not near:
            return MIXED
        self.answered[answer["generation"]] += 1
        return None


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    quick = measure.options(parser).quick
    require_wrk()
    torch.set_num_threads(THREADS)
    # Before anything imports Ray.
    apply_environment()
    from benchmarks.catalogue import disjoint_catalogues, requests, write_bodies

    size = QUICK if quick else FULL
    made = disjoint_catalogues("swap", size.num_items, DIM)
    bodies = [body for each in made for body in requests(each.dataset, K, count=300)]
    known = _known(made, bodies)
    path = write_bodies(made[0].config.home / "bodies.jsonl", bodies)
    result, swaps, rate = _serve(made, size, path, known)

    during = _latencies(result, [(swap.written, swap.freed) for swap in swaps])
    before = _latencies(result, [(swap.quiet, swap.publishing) for swap in swaps])
    if min(len(during), len(before)) < 100:
        raise SystemExit(f"{len(during)} requests during swaps and {len(before)} before are too few")
    if len(known.answered) != 2:
        raise SystemExit(f"both generations should have answered in turn, and these did: {known.answered}")
    mixed = result.errors[MIXED]
    figures = {
        "failed_requests": result.errors.total() - mixed,
        "mixed_generations": mixed,
        "p99_during_over_before": percentile(during, 99) / percentile(before, 99),
        "p99_before_ms": percentile(before, 99) * 1e3,
        "p99_during_ms": percentile(during, 99) * 1e3,
        "worst_during_ms": max(during) * 1e3,
        "swaps": len(swaps),
        "requests": result.count,
        "client_cpu_share": result.cpu_share,
    }
    rows: list[list[object]] = [["requests", "count", "p50 ms", "p99 ms", "p99.9 ms"]]
    for name, times in (("before", before), ("during", during)):
        cells = [f"{percentile(times, percent) * 1e3:.2f}" for percent in (50, 99, 99.9)]
        rows.append([name, len(times), *cells])
    answers = ", ".join(f"{name}: {count}" for name, count in known.answered.items())
    rows.append(["right answers", answers, "", "", ""])
    rows.append([f"at {rate:.0f} requests/s", result.count, str(dict(result.errors)), "", ""])
    for name, begin, end in (("switched", "written", "switched"), ("freed", "switched", "freed")):
        seconds = [getattr(swap, end) - getattr(swap, begin) for swap in swaps]
        rows.append([f"s until {name}", len(swaps), f"{statistics.median(seconds):.2f}", "", ""])
    measure.finish("swap", figures, rows, quick)


def _known(made: list[Catalogue], bodies: list[dict[str, Any]]) -> Known:
    """Answer every body from each generation with the library."""
    from twotower.retrieval.request import RetrieveRequest, parse, query_of
    from twotower.retrieval.retriever import Retriever

    known = Known({}, {})
    for each in made:
        retriever = Retriever.open(each.generation, threads=THREADS)
        answers = [retriever.retrieve(query_of(parse(body, K, RetrieveRequest))).items for body in bodies]
        known.ids[each.generation.name] = [[item["item_id"] for item in items] for items in answers]
        known.scores[each.generation.name] = [[item["score"] for item in items] for items in answers]
    first, second = ({i for ids in lists for i in ids} for lists in known.ids.values())
    if first & second:
        raise SystemExit("the two generations have items in common")
    return known


def _serve(
    made: list[Catalogue], size: Size, bodies: Path, known: Known
) -> tuple[LoadResult, list[Swap], float]:
    """Return what became of the requests, when the swaps were, and the rate of the requests."""
    from serve.app import BuildArgs, build
    from serve.running import serving
    from twotower.cluster.processes import free_port
    from twotower.generations.store import Store

    names = [each.generation.name for each in made]
    config = made[0].config
    # What an index of this size finds is not the matter here.
    Store(config.store).publish(names[0], force=True)
    arguments = BuildArgs(store=str(config.store), threads=THREADS, workers=WORKERS, max_k=K)
    served = config.model_copy(update={"serve": config.serve.model_copy(update={"port": free_port()})})
    with serving(lambda: build(arguments), served) as url:
        closed_loop(url, bodies, 8, 2.0)
        rate = SHARE * closed_loop(url, bodies, 8, 5.0).rate
        lines = bodies.read_bytes().splitlines()
        longest_s = size.swaps * (size.quiet_s + _LONGEST_SWAP_S)
        # In a process of its own: it reads whole generations, and would hold up the clock of the load.
        with multiprocessing.get_context("spawn").Pool(1) as publisher:
            swapping = publisher.apply_async(
                _alternate, (url, str(config.store), names, size.swaps, size.quiet_s)
            )
            result = run_load(url, lines, rate, longest_s, CONNECTIONS, known.judge, until=swapping.ready)
            return result, swapping.get(timeout=_LONGEST_SWAP_S), rate


def _alternate(url: str, store_path: str, names: list[str], count: int, quiet_s: float) -> list[Swap]:
    """Let the pointer name the generations in turn, each time until the service holds only the new one."""
    from twotower.generations.store import Store

    store = Store(store_path)
    # The first requests of a run warm up what there is to warm up.
    time.sleep(quiet_s)
    swaps = []
    for number in range(count):
        name = names[(number + 1) % 2]
        quiet = time.monotonic()
        time.sleep(quiet_s)
        publishing = time.monotonic()
        store.publish(name, force=True)
        changed = (store.root / CURRENT).stat().st_mtime
        written = time.monotonic() - (time.time() - changed)
        switched = _wait(url, written, {"generation": name})
        freed = _wait(url, written, {"held": [name]})
        swaps.append(Swap(quiet, publishing, written, switched, freed))
    return swaps


def _wait(url: str, written: float, wanted: dict[str, Any]) -> float:
    """Wait until ``/readyz`` says what is wanted, and return the moment.

    Raises:
        TimeoutError: it did not in a minute after the pointer was written.
    """
    while time.monotonic() < written + _LONGEST_SWAP_S:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            state = json.load(answer)
        if all(state.get(key) == value for key, value in wanted.items()):
            return time.monotonic()
        time.sleep(_POLL_S)
    raise TimeoutError(f"the service did not swap within {_LONGEST_SWAP_S:.0f} s: {state}")


def _latencies(result: LoadResult, windows: list[tuple[float, float]]) -> list[float]:
    """Return the latencies of the requests due in some windows, those that timed out included."""
    return [
        arrival.latency_s
        for begin, end in windows
        for arrival in result.due_between(begin - result.begin, end - result.begin)
    ]


if __name__ == "__main__":
    main()
