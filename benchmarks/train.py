"""Training: what Ray and the loop around a step cost, and how far two workers are from no communication.

``ray_over_bare``: one Ray Train worker through ``twotower.cluster.train``, with its usual reports, against a
bare torch loop over the same examples, features, model, loss and optimisers.

``library_over_ray``: the same training in this process, as ``twotower.train`` runs it without Ray, over that
worker.

``sequence_ray_over_bare``: the same with a causal transformer over the history (2 blocks, d = 64, L = 50) and
batches of 128 windows of 50 positions.

``two_over_ceiling``: two one-thread workers against two processes that run at the same time and share
nothing, each doing one worker's part of the step (its half of the rows against all candidates).

It ends within twelve minutes: a machine too slow for all repeats takes fewer, and the table shows them.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.model.batch import Bag, bag_of, forget
from twotower.model.losses import Known, in_batch_softmax
from twotower.model.towers import TwoTower
from twotower.training.collectives import World
from twotower.training.examples import Examples, TowerInputs
from twotower.training.tables import TableOptimizer, TouchedRows

WARM_UP = 20
ONE_BY_S, SEQUENCE_BY_S, TWO_BY_S = 220, 400, 600
"""Seconds from the start after which no further repeat of one worker, with sequences, of two begins."""
FEWEST = 3
DIM = 128
SEQUENCE_DIM, LENGTH, WINDOWS = 64, 50, 128
UNKNOWN_RATE = 0.05


def configuration(root: str, interactions: int, batch: int, workers: int, every: int = 20) -> Config:
    """Return the towers of configs/movielens.yaml on generated data: one epoch, no step checkpoints."""
    tower = {"hidden": [128], "norm": "none", "dropout": 0.0, "residual": "id"}
    return parse_config(
        {
            "storage": {"root": root},
            "data": {
                "source": {
                    "kind": "generated",
                    "num_users": interactions // 60,
                    "num_items": 10_000,
                    "num_interactions": interactions,
                }
            },
            "features": {
                "query": [
                    {"name": "history", "type": "history", "dim": DIM, "pooling": "recency", "decay": 0.9},
                    {"name": "genre_profile", "type": "profile", "of": "genres"},
                ],
                "item": [
                    {"name": "item_id", "type": "id", "dim": DIM, "unknown_rate": UNKNOWN_RATE},
                    {"name": "genres", "type": "multi_hot", "dim": 16},
                    {"name": "title", "type": "text", "dim": 16, "buckets": 4096},
                ],
            },
            "model": {"embedding_dim": DIM, "query_tower": tower, "item_tower": tower},
            "train": {
                "epochs": 1,
                "global_batch_size": batch,
                "num_workers": workers,
                "fit": "all",
                "checkpoint_every_steps": None,
                "metrics": {"every_steps": every},
            },
        }
    )


def sequence_configuration(root: str, interactions: int, windows: int, every: int = 20) -> Config:
    """Return a transformer over histories of about 50 items: one epoch, no step checkpoints."""
    values = configuration(root, interactions, windows * LENGTH, 1, every).to_json()
    values["data"]["source"]["num_users"] = interactions // LENGTH
    tower = {"hidden": [], "norm": "none", "dropout": 0.0, "residual": "id"}
    values["features"] = {
        "query": [
            {
                "name": "history",
                "type": "history",
                "dim": SEQUENCE_DIM,
                "max_length": LENGTH,
                "pooling": "transformer",
                "transformer": {"blocks": 2, "heads": 1, "dropout": 0.0},
            }
        ],
        "item": [{"name": "item_id", "type": "id", "dim": SEQUENCE_DIM, "unknown_rate": UNKNOWN_RATE}],
    }
    values["model"] = {"embedding_dim": SEQUENCE_DIM, "query_tower": tower, "item_tower": tower}
    return parse_config(values)


class Bare:
    """The plain loop: one process, no Ray, nothing reported."""

    def __init__(self, config: Config, dataset: Dataset, foreign: int = 0) -> None:
        """Load everything.

        Args:
            config: of the model.
            dataset: prepared.
            foreign: further candidates of each step, constants in the place of other workers' items.
        """
        torch.set_num_threads(1)
        self.batch = config.train.global_batch_size - foreign
        self.inputs = TowerInputs(dataset)
        self.examples = Examples.of(dataset, self.inputs, "all")
        self.model = TwoTower(dataset.schema, config.model, config.train.loss.temperature, config.seed)
        settings = config.train.optimizer
        self.dense = torch.optim.AdamW(
            [*self.model.towers.parameters(), self.model.log_temperature], lr=settings.learning_rate
        )
        self.weights = dict(self.model.tables.items())
        self.tables = TableOptimizer(self.weights, settings.table_kind)
        self.log_q = torch.from_numpy(
            np.log(np.maximum(self.examples.item_counts(), 1) / len(self.examples)).astype(np.float32)
        )
        self.order = self.examples.shuffled(np.random.default_rng(0))
        self.foreign = np.random.default_rng(1).choice(self.examples.item_rows(self.order), foreign)
        self.foreign_vectors = torch.nn.functional.normalize(torch.randn(foreign, config.model.embedding_dim))
        self.at = 0

    def step(self) -> float:
        """Train on the next rows and return the loss."""
        if self.at + self.batch > len(self.order):
            self.at = 0
        rows = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        item_rows = self.examples.item_rows(rows)
        queries, items = self.examples.queries(rows), self.inputs.items(item_rows)
        bag = items["item_id"]
        assert isinstance(bag, Bag)
        items["item_id"] = forget(bag, torch.rand(len(rows)) < UNKNOWN_RATE)
        schema = self.model.schema
        bags = [(f.spec.table_name("query"), bag_of(queries[f.spec.name])) for f in schema.query]
        bags += [(f.spec.table_name("item"), bag_of(items[f.spec.name])) for f in schema.item]
        touched = TouchedRows(self.weights, [(n, b) for n, b in bags if b is not None])
        q = self.model.towers.query(self.model.inputs("query", queries, touched.lookup))
        c = self.model.towers.item(self.model.inputs("item", items, touched.lookup))
        candidate_rows = np.concatenate([item_rows, self.foreign])
        candidates = torch.cat([c, self.foreign_vectors]).requires_grad_()
        ids = torch.from_numpy(candidate_rows)
        offsets, known = self.examples.known_positives(rows, candidate_rows)
        loss = in_batch_softmax(
            q,
            candidates,
            torch.arange(len(rows)),
            self.model.log_temperature.exp(),
            self.log_q[ids],
            ids,
            torch.full((len(rows),), 1 / len(rows)),
            mask_accidental_hits=True,
            known=Known(torch.from_numpy(offsets), torch.from_numpy(known), ids),
        )
        self.dense.zero_grad()
        loss.backward()
        self.dense.step()
        self.tables.step(touched.gradients(World()), 3e-3)
        return loss.item()


def bare_rate(config: dict[str, Any], dataset: str, steps: int, foreign: int, start: Any, rate: Any) -> None:
    """Put the examples/s of the plain loop, after its warm-up, into ``rate``; a process of its own."""
    loop = Bare(parse_config(config), Dataset.open(dataset), foreign)
    for _ in range(WARM_UP if foreign == 0 else 3):
        loop.step()
    start.wait()
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    rate.put(steps * loop.batch / (time.perf_counter() - begin))


def bare(config: Config, dataset: Dataset, steps: int, processes: int) -> float:
    """Return the summed examples/s of plain loops in processes of their own, started together."""
    context = multiprocessing.get_context("spawn")
    rates, start = context.Queue(), context.Barrier(processes)
    foreign = config.train.global_batch_size // processes * (processes - 1)
    arguments = (config.to_json(), str(dataset.path), steps, foreign, start, rates)
    running = [context.Process(target=bare_rate, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    found = [rates.get() for _ in running]
    for process in running:
        process.join()
    return sum(found)


def through_ray(config: Config, dataset: Dataset, first: int, last: int, without: bool = False) -> float:
    """Return the examples/s of Ray Train's workers between two steps, from the metrics they write.

    Args:
        config: of the training.
        dataset: prepared.
        first: step from which is counted.
        last: step to which is counted.
        without: train in this process instead, without Ray.
    """
    from twotower.cluster.train import on_ray
    from twotower.pipeline.train import in_this_process, train

    with tempfile.TemporaryDirectory() as root:
        here = config.model_copy(update={"storage": config.storage.model_copy(update={"root": root})})
        train(here, dataset, fit="all", engine=in_this_process if without else on_ray())
        (lines,) = (here.home / "logs").glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    at = {row["step"]: datetime.fromisoformat(row["time"]) for row in rows if "loss" in row}
    seconds = (at[last] - at[first]).total_seconds()
    return (last - first) * config.train.global_batch_size / seconds


def main() -> None:
    """Measure both figures, ours and the limit in turn."""
    quick = measure.start("Training through Ray against bare torch, and two workers against one.", 1)
    # Ray reads its environment when it is imported.
    from twotower.environment import apply_environment

    apply_environment()
    from twotower.cluster.session import session

    begin = time.monotonic()

    def another(turn: int, repeats: int, by: float) -> bool:
        return turn < repeats and (turn < FEWEST or time.monotonic() - begin < by)

    steps, repeats = (40, 1) if quick else (200, 9)
    two_steps, two_repeats = (10, 1) if quick else (30, 5)
    sequence_steps, sequence_repeats = (10, 1) if quick else (30, 7)
    small, large, windows = (256, 1024, 16) if quick else (1024, 8192, WINDOWS)
    names_of_runs = ("bare", "ray", "library", "bare_sequence", "ray_sequence", "ceiling", "two")
    found: dict[str, list[float]] = {name: [] for name in names_of_runs}
    with tempfile.TemporaryDirectory() as root:
        one = configuration(root, round(small * (steps + WARM_UP + 1) * 1.15), small, 1)
        two = configuration(root, round(large * (two_steps + 12) * 1.15), large, 2, every=10)
        positions = windows * LENGTH
        sequence = sequence_configuration(root, round(positions * (sequence_steps + 12) * 1.15), windows, 10)
        data = {1: prepare(one), 2: prepare(two), "sequence": prepare(sequence)}
        with session(one):
            found["bare"].append(bare(one, data[1], steps, 1))
            while another(len(found["ray"]), repeats, ONE_BY_S):
                found["ray"].append(through_ray(one, data[1], WARM_UP, WARM_UP + steps))
                found["library"].append(through_ray(one, data[1], WARM_UP, WARM_UP + steps, without=True))
                found["bare"].append(bare(one, data[1], steps, 1))
            found["bare_sequence"].append(bare(sequence, data["sequence"], sequence_steps, 1))
            while another(len(found["ray_sequence"]), sequence_repeats, SEQUENCE_BY_S):
                last = 10 + sequence_steps // 10 * 10
                found["ray_sequence"].append(through_ray(sequence, data["sequence"], 10, last))
                found["bare_sequence"].append(bare(sequence, data["sequence"], sequence_steps, 1))
            while another(len(found["two"]), two_repeats, TWO_BY_S):
                found["ceiling"].append(bare(two, data[2], two_steps, 2))
                found["two"].append(through_ray(two, data[2], 10, 10 + two_steps // 10 * 10))

    # The machine's speed drifts: Ray's run is held against the mean of the bare ones before and after it.
    def over_bare(ray: str, bare: str) -> list[float]:
        around = [(a + b) / 2 for a, b in pairwise(found[bare])]
        return [a / b for a, b in zip(found[ray], around, strict=True)]

    ratios = {
        "ray_over_bare": over_bare("ray", "bare"),
        "library_over_ray": [a / b for a, b in zip(found["library"], found["ray"], strict=True)],
        "sequence_ray_over_bare": over_bare("ray_sequence", "bare_sequence"),
        "two_over_ceiling": [a / b for a, b in zip(found["two"], found["ceiling"], strict=True)],
    }
    names = {
        "bare": f"bare loop, batch {small}",
        "ray": f"one Ray Train worker, batch {small}",
        "library": f"this process without Ray, batch {small}",
        "bare_sequence": f"bare loop, {windows} windows of {LENGTH} positions",
        "ray_sequence": f"one Ray Train worker, {windows} windows of {LENGTH} positions",
        "ceiling": f"two unconnected processes, batch {large}",
        "two": f"two Ray Train workers, batch {large}",
    }
    table: list[tuple[object, ...]] = [("", "examples/s, median", "all")]
    for key, values in found.items():
        table.append((names[key], f"{np.median(values):,.0f}", " ".join(f"{v:,.0f}" for v in values)))
    for key, values in ratios.items():
        table.append((key, f"{np.median(values):.3f}", " ".join(f"{v:.3f}" for v in values)))
    measure.finish("train", {k: float(np.median(v)) for k, v in ratios.items()}, table, quick)


if __name__ == "__main__":
    main()
