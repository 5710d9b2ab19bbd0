"""Serving 1M items of 128 dimensions over HTTP, k = 100: latency and throughput, and what Ray adds to them.

The service on Ray Serve behind HAProxy, the same routes under plain uvicorn, and the library in process
answer the same requests from the same generation in turn. wrk is the client; at half of the rate that
saturates the service it is ``benchmarks.load``. Everything shares the machine's CPUs. A machine shared with
others changes its speed within seconds, so ratios are of short runs in the same round, and half of saturation
is half of the rate that was measured just before.

``p50_ms``, ``p99_ms``: one connection. ``p99_ms_at_half_saturation``: open loop at half of the rate that
eight connections just reached. ``p50_over_uvicorn``, ``p99_over_uvicorn``, ``qps_over_uvicorn`` (eight
connections): over plain uvicorn. ``p50_minus_inprocess_ms``: over the library from the same request to the
same JSON. ``serve_p50_10x_items``: ten times as many items, the same factory. ``sharded_minus_fused_p50_ms``:
two shard groups behind a gateway. ``sequence_p50_ms``, ``sequence_p99_ms``: one connection to 1M items of
64 dimensions whose queries are histories of 50 items read by a causal transformer of two blocks;
``sequence_encode_ms`` is what the library takes from a request's values to its vector. ``--only sequence``
measures these alone, into results/serve-sequence.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import measure
from benchmarks.clients import Measured, closed_loop, open_loop, require_wrk
from benchmarks.plain_server import plain_server, wait_until_ready
from twotower.client import Client
from twotower.environment import apply_environment

if TYPE_CHECKING:
    from benchmarks.catalogue import Catalogue
    from twotower.retrieval.retriever import Retriever

K = 100
MAX_K = 1_000
THREADS, WORKERS = 1, 2
MANY = 8
"""Connections that saturate the service."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_items: int
    rounds: int
    seconds: float
    """Of each run of a client."""
    short_rounds: int
    """Of runs of two fifths of that, on one connection."""


FULL, QUICK = Size(1_000_000, 7, 5.0, 20), Size(40_000, 2, 1.0, 2)
Rounds = dict[str, list[Measured]]
Run = Callable[[Mapping[str, Measured]], Measured]
"""Runs one client; is given what each client measured last, by name."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fused-only", action="store_true", help="leave out the sharded topology")
    parser.add_argument("--only", choices=["sequence"], help="measure the sequence encoder and nothing else")
    options = measure.options(parser)
    require_wrk()
    torch.set_num_threads(THREADS)
    # Before anything imports Ray.
    apply_environment()
    from benchmarks.catalogue import catalogue, chosen_factory, requests, write_bodies
    from twotower.retrieval.retriever import Retriever

    size = QUICK if options.quick else FULL
    heading = ["what", "p50 ms", "spread", "p99 ms", "spread", "requests/s", "spread", "client CPU"]
    if options.only == "sequence":
        figures, rows = _sequence(size)
        measure.finish("serve-sequence", figures, [heading, *rows], options.quick)
        return
    factory = chosen_factory(size.num_items)
    large, small = (catalogue("serve", n, factory) for n in (size.num_items, size.num_items // 10))
    bodies = requests(large.dataset, K)
    paths = {
        name: write_bodies(made.config.home / "bodies.jsonl", requests(made.dataset, K))
        for name, made in (("large", large), ("small", small))
    }
    library = Retriever.open(large.generation, threads=THREADS)
    fused, others = _serve(large, small, size, paths, library, bodies, sharded=not options.fused_only)

    half = fused["serve, half of saturation"]
    figures = {
        "p50_ms": _median(fused["serve"], "p50_ms"),
        "p99_ms": _median(fused["serve"], "p99_ms"),
        "p99_ms_at_half_saturation": _median(half, "p99_ms"),
        "p99_at_half_saturation_over_uvicorn": _over(half, fused["uvicorn, the same rate"], "p99_ms"),
        "p50_over_uvicorn": _over(fused["serve"], fused["uvicorn"], "p50_ms"),
        "p99_over_uvicorn": _over(fused["serve"], fused["uvicorn"], "p99_ms"),
        "qps_over_uvicorn": _over(fused[f"serve, {MANY}"], fused[f"uvicorn, {MANY}"], "rate"),
        "p50_minus_inprocess_ms": _minus(fused["serve"], fused["in process"]),
        "serve_p50_10x_items": _over(others["serve"], others["serve, a tenth of the items"], "p50_ms"),
        "index_recall": large.index["index_recall"],
        "qps": _median(fused[f"serve, {MANY}"], "rate"),
        "client_cpu_share": _median(fused["serve"], "cpu_share"),
        "client_cpu_share_at_half_saturation": _median(half, "cpu_share"),
    }
    if "serve, sharded" in others:
        figures["sharded_minus_fused_p50_ms"] = _minus(others["serve, sharded"], others["serve"])
    table = [heading, *_rows(fused), *_rows({f"beside others: {n}": r for n, r in others.items()})]
    for made in (large, small):
        facts = f"{made.dataset.num_catalogue_items:,} items, {made.index['factory']}"
        table.append([f"{facts}: index recall {made.index['index_recall']:.4f}"])
    sequence_figures, rows = _sequence(size)
    figures |= sequence_figures
    table += rows
    measure.finish("serve", figures, [row + [""] * (len(heading) - len(row)) for row in table], options.quick)


def _serve(
    large: Catalogue,
    small: Catalogue,
    size: Size,
    paths: Mapping[str, Path],
    library: Retriever,
    bodies: list[dict[str, Any]],
    sharded: bool,
) -> tuple[Rounds, Rounds]:
    """Return what was measured of the service alone, and then beside other applications of the same Serve."""
    from serve.app import BuildArgs, build
    from serve.running import serving
    from twotower.cluster.processes import free_port

    def arguments(made: Catalogue, **more: Any) -> BuildArgs:
        return BuildArgs(store=str(made.config.store), threads=THREADS, workers=WORKERS, max_k=MAX_K, **more)

    short = 0.4 * size.seconds
    config = large.config.model_copy(
        update={"serve": large.config.serve.model_copy(update={"port": free_port()})}
    )

    def one(url: str, name: str = "large") -> Run:
        return lambda _: closed_loop(url, paths[name], 1, short)

    def many(url: str) -> Run:
        return lambda _: closed_loop(url, paths["large"], MANY, size.seconds)

    def half(what: str, url: str) -> Run:
        return lambda latest: open_loop(
            what, url, paths["large"], latest[f"serve, {MANY}"].rate / 2, 2 * size.seconds
        )

    with serving(lambda: build(arguments(large)), config) as url:
        with plain_server(large.generation, free_port(), THREADS, WORKERS, MAX_K) as plain:
            _check_same([url, plain], library, bodies)
            clients = {
                "serve": one(url),
                "uvicorn": one(plain),
                "in process": lambda _: _in_process(library, bodies, short),
            }
            fused = _rounds(clients, size.short_rounds)
            clients = {
                f"uvicorn, {MANY}": many(plain),
                f"serve, {MANY}": many(url),
                "serve, half of saturation": half("serve", url),
                "uvicorn, the same rate": half("uvicorn", plain),
            }
            fused |= _rounds(clients, size.rounds, turning=False)
        # Only now: what other applications do while they wait would be in the figures above.
        clients = {"serve": one(url)}
        tenth = _add("small", build(arguments(small)), url)
        clients["serve, a tenth of the items"] = one(tenth, "small")
        if sharded:
            groups = _add("sharded", build(arguments(large, topology="sharded", groups=2)), url)
            _check_same([groups], library, bodies)
            clients["serve, sharded"] = one(groups)
        return fused, _rounds(clients, size.short_rounds)


def _sequence(size: Size) -> tuple[dict[str, float], list[list[object]]]:
    """Return figures and rows of the service whose queries are sequences."""
    from benchmarks.catalogue import (
        SEQUENCE_DIM,
        SEQUENCE_LENGTH,
        catalogue,
        chosen_factory,
        requests,
        sequence_configuration,
        write_bodies,
    )
    from serve.app import BuildArgs, build
    from serve.running import serving
    from twotower.cluster.processes import free_port
    from twotower.retrieval.retriever import Retriever

    factory = chosen_factory(size.num_items, SEQUENCE_DIM)
    made = catalogue("serve-sequence", size.num_items, factory, sequence_configuration)
    bodies = requests(made.dataset, K, length=SEQUENCE_LENGTH)
    path = write_bodies(made.config.home / "bodies.jsonl", bodies)
    library = Retriever.open(made.generation, threads=THREADS)
    short = 0.4 * size.seconds
    config = made.config.model_copy(
        update={"serve": made.config.serve.model_copy(update={"port": free_port()})}
    )
    arguments = BuildArgs(store=str(made.config.store), threads=THREADS, workers=WORKERS, max_k=MAX_K)
    with serving(lambda: build(arguments), config) as url:
        _check_same([url], library, bodies)
        clients: dict[str, Run] = {
            "serve": lambda _: closed_loop(url, path, 1, short),
            "in process": lambda _: _in_process(library, bodies, short),
            "encode in process": lambda _: _in_process(library, bodies, short, _encode),
        }
        found = _rounds(clients, size.short_rounds)
    figures = {
        "sequence_p50_ms": _median(found["serve"], "p50_ms"),
        "sequence_p99_ms": _median(found["serve"], "p99_ms"),
        "sequence_encode_ms": _median(found["encode in process"], "p50_ms"),
    }
    facts = f"{made.dataset.num_catalogue_items:,} items, {made.index['factory']}, d = {SEQUENCE_DIM}"
    rows = [
        *_rows({f"sequence: {name}": runs for name, runs in found.items()}),
        [f"{facts}: index recall {made.index['index_recall']:.4f}", *[""] * 7],
    ]
    return figures, rows


def _add(name: str, application: Any, url: str) -> str:
    """Run one more application beside the first, below a path of its own, and return its address."""
    from ray import serve

    serve.run(application, name=name, route_prefix=f"/{name}")
    with Client(f"{url}/{name}") as client:
        wait_until_ready(client)
    return f"{url}/{name}"


def _rounds(clients: Mapping[str, Run], rounds: int, turning: bool = True) -> Rounds:
    """Run the clients one after the other in each round; the first round warms up only.

    Args:
        clients: by name.
        rounds: that count.
        turning: begin each round with the next one.
    """
    names = list(clients)
    found: Rounds = {name: [] for name in names}
    latest: dict[str, Measured] = {}
    for number in range(rounds + 1):
        shift = number % len(names) if turning else 0
        for name in names[shift:] + names[:shift]:
            latest[name] = clients[name](latest)
            if number > 0:
                found[name].append(latest[name])
    return found


def _in_process(
    retriever: Retriever,
    bodies: list[dict[str, Any]],
    seconds: float,
    work: Callable[[Retriever, dict[str, Any]], object] | None = None,
) -> Measured:
    """Work on requests one by one with the library: from their values to the answer's JSON, or ``work``."""
    work = work or _answer
    times = []
    begin, cpu = time.perf_counter(), time.process_time()
    while (start := time.perf_counter()) < begin + seconds:
        work(retriever, bodies[len(times) % len(bodies)])
        times.append(time.perf_counter() - start)
    wall = time.perf_counter() - begin
    cuts = statistics.quantiles(times, n=100)
    share = (time.process_time() - cpu) / wall
    return Measured(cuts[49] * 1e3, cuts[98] * 1e3, len(times) / wall, share)


def _answer(retriever: Retriever, body: dict[str, Any]) -> bytes:
    from serve.service import to_json
    from twotower.retrieval.request import RetrieveRequest, parse, query_of

    return to_json(retriever.retrieve(query_of(parse(body, MAX_K, RetrieveRequest))))


def _encode(retriever: Retriever, body: dict[str, Any]) -> object:
    from twotower.retrieval.request import RetrieveRequest, parse, query_of

    return retriever.encode([query_of(parse(body, MAX_K, RetrieveRequest))])


def _check_same(urls: list[str], retriever: Retriever, bodies: list[dict[str, Any]]) -> None:
    """End the benchmark unless every service answers some requests as the library does."""
    for body in bodies[:20]:
        known = _ids(_answer(retriever, body))
        for url in urls:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/retrieve", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                if _ids(answer.read()) != known:
                    raise SystemExit(f"{url} answers {body} with other items than the library")


def _ids(content: bytes) -> list[str]:
    return [item["item_id"] for item in json.loads(content)["items"]]


def _values(runs: list[Measured], name: str) -> list[float]:
    return [float(getattr(run, name)) for run in runs]


def _median(runs: list[Measured], name: str) -> float:
    return statistics.median(_values(runs, name))


def _over(ours: list[Measured], other: list[Measured], name: str) -> float:
    """Return the median of the ratios of the same round."""
    pairs = zip(_values(ours, name), _values(other, name), strict=True)
    return statistics.median(a / b for a, b in pairs)


def _minus(ours: list[Measured], other: list[Measured]) -> float:
    """Return the median of the differences of p50 in the same round, in milliseconds."""
    pairs = zip(_values(ours, "p50_ms"), _values(other, "p50_ms"), strict=True)
    return statistics.median(a - b for a, b in pairs)


def _rows(found: Rounds) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, runs in found.items():
        cells: list[object] = [name]
        for field, digits in (("p50_ms", 2), ("p99_ms", 2), ("rate", 0)):
            sample = measure.Sample(tuple(_values(runs, field)))
            cells += [f"{sample.median:.{digits}f}", f"{sample.spread:.0%}"]
        rows.append([*cells, f"{_median(runs, 'cpu_share'):.2f}"])
    return rows


if __name__ == "__main__":
    main()
