"""Replicas that are killed or late, in the sharded topology of two groups of two replicas, under load.

Open-loop load at a third of saturation while (a) one group is 50 ms late in 2% of its calls, in turn with
undisturbed rounds, (b) one replica is killed with SIGKILL, (c) a whole group is. Every answer is compared
with those of the library.

``wrong_answers``: complete answers that are not the library's, partial ones that are not the best of the
groups that are there, and failed requests. ``unflagged_partials``: answers that lack a group and do not say
so. ``recovered_s``: from the kill to the first of 100 complete answers in a row, the worse of (b) and (c).
``hedged_p99_over_undisturbed``: p99 of a round of (a) over that of the round before it, the median.
``hedge_extra_calls``: second calls to a group over all calls, in (a).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks import measure
from benchmarks.load import LoadResult, percentile, run_load
from serve.running import serving
from twotower.cluster.processes import Guard, Process, descendants, free_port
from twotower.config import Config, parse_config
from twotower.environment import apply_environment
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.retrieval.groups import GroupQuery, ShardGroup
from twotower.retrieval.retriever import Query, Retriever

GROUPS, REPLICAS = 2, 2
LATE_SHARE = 0.02
K, NUM_USERS = 100, 200
IN_A_ROW = 100
CONNECTIONS = 8
_NOTHING = [""] * 4


@dataclass
class Known:
    """What the library answers."""

    bodies: list[bytes]
    complete: list[list[str]]
    """Ids of the answer to each body."""
    of_group: list[dict[str, list[str]]]
    """Ids of the answer to each body without a group, by the group's name."""


@dataclass
class Seen:
    """The answers of one round, in the order in which they came."""

    answers: list[tuple[float, int, int, bytes]]
    """(time.monotonic(), number of the body, status, content)."""
    load: LoadResult


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", threads=1)
    num_items, rounds, seconds = (20_000, 1, 6.0) if quick else (200_000, 7, 20.0)
    # Before anything imports Ray.
    apply_environment()
    from benchmarks.late import LateShardSearch
    from serve.app import BuildArgs, sharded
    from serve.group import ShardReplica
    from twotower.cluster.session import session

    with tempfile.TemporaryDirectory() as folder:
        config, built = made_service(Path(folder), num_items)
        with session(config):
            known = _known(built)
            args = BuildArgs(
                store=str(config.store), topology="sharded", groups=GROUPS, replicas_per_group=REPLICAS
            )
            replica: Any = ShardReplica.options(func_or_class=LateShardSearch)
            with serving(lambda: sharded(args, replica), config) as url:
                check_settings(url)
                figures, rows = _measured(url, known, rounds, seconds)
    measure.finish("faults", figures, rows, quick)


def _measured(
    url: str, known: Known, rounds: int, seconds: float
) -> tuple[dict[str, float], list[list[object]]]:
    run_load(url, known.bodies, 50, 5, CONNECTIONS)
    saturation = run_load(url, known.bodies, 2000, 4, CONNECTIONS, timeout=60).achieved_rate
    rate = saturation / 3
    rows: list[list[object]] = [
        ["what", "answers", "partial", "p50 ms", "p99 ms"],
        [f"saturated by {CONNECTIONS} connections: {saturation:.0f}/s; rate below: {rate:.0f}/s", *_NOTHING],
    ]
    wrong = unflagged = 0
    p99: dict[str, list[float]] = {"undisturbed": [], "late": []}
    calls = extra = 0
    for _ in range(rounds):
        for name, share in (("undisturbed", 0.0), ("late", LATE_SHARE)):
            _be_late("Group-0", share)
            before = _counts(url)
            seen = _round(url, known, rate, seconds)
            after = _counts(url)
            p99[name].append(percentile([a.latency_s for a in seen.load.arrivals], 99))
            if name == "late":
                calls += sum(g["calls"] for g in after.values()) - sum(g["calls"] for g in before.values())
                extra += sum(g["hedges"] + g["retries"] for g in after.values()) - sum(
                    g["hedges"] + g["retries"] for g in before.values()
                )
            bad = _judged(seen, known)
            wrong, unflagged = wrong + bad[0], unflagged + bad[1]
            rows.append([name, *_row(seen, bad)])
    _be_late("Group-0", 0.0)
    recovered = []
    for name, victims in (("a replica is killed", 1), ("a group is killed", REPLICAS)):
        seen, killed = _kill(url, known, rate, seconds * 2, victims)
        bad = _judged(seen, known)
        wrong, unflagged = wrong + bad[0], unflagged + bad[1]
        recovered.append(_recovery(seen, killed))
        rows.append([f"{name} ({recovered[-1]:.1f} s)", *_row(seen, bad)])
        if victims == REPLICAS and not bad[2]:
            raise SystemExit("a whole group was killed and no answer was partial: nothing was measured")
    rows.append([f"CPU share of the client: {seen.load.cpu_share:.2f}", *_NOTHING])
    figures = {
        "wrong_answers": wrong,
        "unflagged_partials": unflagged,
        "recovered_s": max(recovered),
        "hedged_p99_over_undisturbed": statistics.median(
            late / undisturbed for late, undisturbed in zip(p99["late"], p99["undisturbed"], strict=True)
        ),
        "hedge_extra_calls": extra / calls,
    }
    return figures, rows


def made_service(root: Path, num_items: int) -> tuple[Config, Path]:
    """Return a configuration on a free port, and its published generation: trained towers in four shards."""
    from benchmarks.delta import configuration

    values = configuration(root, num_items).to_json()
    values["serve"]["port"] = free_port()
    config = parse_config(values)
    # In a process of its own: what training and building leave running would hold up the clients of this one.
    maker = multiprocessing.get_context("spawn").Process(target=_make, args=(config,))
    maker.start()
    try:
        maker.join()
    finally:
        # Where this one is interrupted; the end of one that has ended.
        maker.terminate()
        maker.join()
    if maker.exitcode:
        raise SystemExit(f"no generation was made: exit code {maker.exitcode}; see above")
    store = Store(config.store)
    return config, store.path(store.published())


def _make(config: Config) -> None:
    """Publish the generation of a configuration; the main function of a process."""
    from twotower.cluster.build import build_generation
    from twotower.cluster.session import session
    from twotower.cluster.train import train
    from twotower.data.prepare import prepare

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.closing(Guard()) as guard, session(config):
        guard.add_processes(descendants(os.getpid()))
        dataset = prepare(config)
        built = build_generation(config, dataset, train(config, dataset, fit="all", epochs=1))
        # What an index of this size finds is not the matter here.
        Store(config.store).publish(built.name, force=True)


def _end_with_parent() -> None:
    """End this process, and so its Ray, when the one that started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def check_settings(url: str) -> None:
    """End the benchmark where the service runs without the settings of ``deploy/ray.env``."""
    with urllib.request.urlopen(f"{url}/readyz") as answer:
        missing = json.load(answer)["settings"]["missing"]
    if missing:
        raise SystemExit(
            f"the service runs without {', '.join(missing)}: Ray was started before they were set"
        )


def user_bodies(generation: Path) -> list[bytes]:
    """Return requests of known users with a stored history."""
    ids = Generation.open(generation, verify=False).user_ids
    return [json.dumps({"user_id": ids.id(row), "k": K}).encode() for row in range(NUM_USERS)]


def _known(generation: Path) -> Known:
    """Return the library's answers for some users, whole and without each group."""
    retriever = Retriever.open(generation, verify=False)
    opened = Generation.open(generation, verify=False)
    users = [opened.user_ids.id(row) for row in range(NUM_USERS)]
    known = Known(
        user_bodies(generation),
        [[i["item_id"] for i in retriever.retrieve(Query(k=K, user_id=u)).items] for u in users],
        [{} for _ in users],
    )
    for number, names in enumerate(opened.shard_groups(GROUPS)):
        rest = [n for n in opened.shard_names if n not in names]
        others = ShardGroup(opened, rest)
        for at, user in enumerate(users):
            encoded = retriever.encode([Query(k=K, user_id=user)])
            query = GroupQuery(K, encoded.inputs[0].excluded)
            (hits,) = others.search(encoded.vectors, [query])
            known.of_group[at][f"group-{number}"] = opened.item_ids.ids(hits.item_rows)
    if len({tuple(ids) for ids in known.complete}) < NUM_USERS / 2:
        raise SystemExit("most users have the same answer: mixed-up answers would not be noticed")
    return known


def _round(url: str, known: Known, rate: float, seconds: float) -> Seen:
    answers: list[tuple[float, int, int, bytes]] = []

    def note(body: int, status: int, content: bytes) -> None:
        answers.append((time.monotonic(), body, status, content))

    return Seen(answers, run_load(url, known.bodies, rate, seconds, 64, on_answer=note))


def _kill(url: str, known: Known, rate: float, seconds: float, victims: int) -> tuple[Seen, float]:
    """Kill replicas of the second group a few seconds into a round; return when."""
    killed: list[float] = []

    def kill() -> None:
        processes = _replicas("Group-1")
        if len(processes) != REPLICAS:
            return
        killed.append(time.monotonic())
        for process in processes[:victims]:
            os.kill(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds / 8, kill)
    timer.start()
    seen = _round(url, known, rate, seconds)
    timer.join()
    if not killed:
        raise SystemExit(f"Group-1 has {len(_replicas('Group-1'))} replicas, not {REPLICAS}: none was killed")
    deadline = time.monotonic() + 60
    while len(_replicas("Group-1")) < REPLICAS and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen, killed[0]


def _replicas(group: str) -> list[Process]:
    found = []
    for process in descendants(os.getpid()):
        try:
            name = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f":{group}-".encode() in name and process.alive:
            found.append(process)
    return found


def _judged(seen: Seen, known: Known) -> tuple[int, int, int]:
    """Return how many answers were wrong, partial without saying so, and partial."""
    wrong = seen.load.errors.total()
    unflagged = partial = 0
    for _, body, status, content in seen.answers:
        if status != 200:
            continue
        answer = orjson.loads(content)
        ids = [i["item_id"] for i in answer["items"]]
        parts = known.of_group[body]
        if answer["partial"]:
            partial += 1
            (missing,) = answer["missing_groups"]
            wrong += ids != parts[missing]
        elif ids != known.complete[body]:
            if ids in parts.values():
                unflagged += 1
            else:
                wrong += 1
    return wrong, unflagged, partial


def _recovery(seen: Seen, killed: float) -> float:
    """Return the seconds from the kill to the first of many complete answers in a row.

    Requests without any answer are no part of the row: they count as wrong answers.
    """
    first, count = killed, 0
    for moment, _, status, content in seen.answers:
        if moment < killed:
            continue
        if status == 200 and not orjson.loads(content)["partial"]:
            first = moment if count == 0 else first
            count += 1
            if count == IN_A_ROW:
                return first - killed
        else:
            count = 0
    raise SystemExit(f"no {IN_A_ROW} complete answers in a row after the kill")


def _row(seen: Seen, bad: tuple[int, int, int]) -> list[object]:
    for kind, count in seen.load.errors.items():
        print(f"failed: {count} of {kind}")
    p50, p99 = (f"{seen.load.percentile_ms(p):.2f}" for p in (50, 99))
    return [len(seen.answers), bad[2], p50, p99]


def _be_late(group: str, share: float) -> None:
    """Have the replicas of a group be late in a share of all calls from now on."""
    from ray import serve

    for replica in range(REPLICAS):
        handle = serve.get_deployment_handle(f"{group}-{replica}", "twotower")
        if not handle.is_initialized:
            # The service's settings let handles work inside an event loop only. Ray has no public way around.
            handle._init(_run_router_in_separate_loop=True)
        handle.be_late.remote(share).result(timeout_s=30)


def _counts(url: str) -> dict[str, dict[str, int]]:
    with urllib.request.urlopen(f"{url}/readyz") as answer:
        groups: dict[str, dict[str, int]] = json.load(answer)["groups"]
    return groups


if __name__ == "__main__":
    main()
